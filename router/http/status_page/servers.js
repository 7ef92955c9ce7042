
// One card for each server.

const serverCards = new Map();

function showServers(model) {
  const list = document.getElementById("servers");
  const sorted = [...model.servers].sort((a, b) => b.role.localeCompare(a.role) || a.id.localeCompare(b.id));
  const roles = [...new Set(sorted.map((server) => server.role))].map((role) => {
    const alive = sorted.filter((server) => server.role === role && server.state === "alive").length;
    return `${alive} of ${sorted.filter((server) => server.role === role).length} ${role} alive`;
  });
  setText(document.getElementById("summary"), roles.join(", "));
  const known = new Set(sorted.map((server) => server.id));
  for (const [id, card] of serverCards) {
    if (!known.has(id)) {
      card.root.remove();
      serverCards.delete(id);
    }
  }
  for (const server of sorted) {
    if (!serverCards.has(server.id)) serverCards.set(server.id, newCard(server.id));
    const card = serverCards.get(server.id);
    fillCard(card, server, model.rates.get(server.id));
    if (list.children[sorted.indexOf(server)] !== card.root) {
      list.insertBefore(card.root, list.children[sorted.indexOf(server)] ?? null);
    }
  }
}

function newCard(id) {
  const card = { root: element("li", "server"), values: new Map() };
  const title = element("h3", "", id);
  card.state = element("span", "badge");
  card.policy = element("span", "policy");
  title.append(card.state, card.policy);
  const bar = element("div", "bar");
  card.used = element("span", "used");
  card.cached = element("span", "cached");
  bar.append(card.used, card.cached);
  card.bar = bar;
  card.bar.setAttribute("role", "img");
  card.list = element("dl");
  card.decisions = element("p", "decisions");
  card.root.append(title, bar, card.list, card.decisions);
  return card;
}

function fillCard(card, server, rate) {
  setText(card.state, server.state);
  setClass(card.state, `badge ${server.state === "alive" ? "good" : "warn"}`);
  setText(card.policy, server.policy || "policy unknown");
  const total = Math.max(1, server.num_total_tokens);
  card.used.style.width = `${(100 * server.num_used_tokens) / total}%`;
  card.cached.style.width = `${(100 * server.num_cached_tokens) / total}%`;
  const memory = `KV: ${count(server.num_used_tokens)} tokens in use, ${count(server.num_cached_tokens)} cached, ${count(server.num_free_tokens)} free`;
  if (card.bar.title !== memory) {
    card.bar.title = memory;
    card.bar.setAttribute("aria-label", memory);
  }
  const values = [
    ["streams", count(server.num_streams)],
    ["running", count(server.num_running)],
    ["to compute", count(server.num_pending_tokens)],
    ["prefill/s", rate === undefined ? "–" : count(Math.round(rate))],
    ["KV in use", count(server.num_used_tokens)],
    ["cached", count(server.num_cached_tokens)],
    ["free", `${count(server.num_free_tokens)} of ${count(server.num_total_tokens)}`],
  ];
  if (server.num_uncommitted_tokens !== null) {
    values.push(["uncommitted", `${count(server.num_uncommitted_tokens)} of ${count(server.max_uncommitted_tokens)}`]);
  }
  if (server.role === "prefill") {
    values.push(["in host memory", count(server.num_host_tokens)]);
    values.push(["preempted", count(server.num_preemptions)]);
    values.push(["controller", server.controller_alive ? "alive" : "not heard"]);
  }
  values.push(["loop", `${seconds(server.loop_age_ms)} ago`], ["heartbeat", `${seconds(server.heartbeat_age_ms)} ago`]);
  fillValues(card, values);
  const decided = Object.entries(server.decisions).sort((a, b) => b[1] - a[1]);
  let text = decided.map(([decision, number]) => `${count(number)} ${words(decision)}`).join(", ");
  if (!server.answered) text = "no word from its scheduler yet";
  setText(card.decisions, text ? `Decisions: ${text}` : "No streams to decide on");
}

function fillValues(card, values) {
  const names = values.map(([name]) => name).join();
  if (card.names !== names) {
    card.names = names;
    card.list.replaceChildren();
    card.values.clear();
    for (const [name] of values) {
      const value = element("dd");
      const pair = element("div");
      card.values.set(name, value);
      pair.append(element("dt", "", name), value);
      card.list.append(pair);
    }
  }
  for (const [name, value] of values) setText(card.values.get(name), value);
}

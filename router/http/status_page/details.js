
// What is known of one stream, below its row: its whole life, and the same as text.

const MOST_SHOWN_ROWS = 60;

function newDetails() {
  const root = element("div", "details");
  const canvas = element("canvas");
  canvas.setAttribute("aria-hidden", "true");
  const axis = element("canvas");
  axis.style.height = "22px";
  axis.setAttribute("aria-hidden", "true");
  const list = element("dl");
  const tables = element("div", "tables");
  root.append(axis, canvas, list, tables);
  return { root, canvas, axis, list, tables, version: -1 };
}

function drawDetails(details, stream, nowMs) {
  const { facts } = stream;
  const endMs = facts.ended_ms ?? nowMs;
  const lengthMs = Math.max(200, endMs - facts.opened_ms);
  const range = { fromMs: facts.opened_ms - 0.01 * lengthMs, toMs: endMs + 0.02 * lengthMs, zeroMs: facts.opened_ms };
  drawAxis(details.axis, range, "opened");
  drawStream(details.canvas, stream, range, nowMs);
}

function fillDetails(details, stream, model) {
  if (details.version === stream.version) return;
  details.version = stream.version;
  const { facts, moments, verdict } = stream;
  const since = (ms) => (ms === null || ms === undefined ? "–" : seconds(ms - facts.opened_ms));
  const commitMs = moments.commit_ms;
  const firstMs = moments.first_token_ms;
  const entries = [
    ["stream", facts.id],
    ["request", facts.request_id || "–"],
    ...(facts.tenant ? [["tenant", facts.tenant]] : []),
    ["mode, priority", `${facts.mode}, ${facts.priority}`],
    ["opened", clockTime(model.epochMs + facts.opened_ms)],
    ["prompt tokens", count(facts.num_known_tokens)],
    ["computed", count(facts.num_computed_tokens)],
    ["thrown away by updates", count(facts.num_invalidated_tokens)],
    ["KV there now", verdict ? `${count(verdict.num_resident_tokens)} on ${verdict.server}` : "–"],
    ["of it shared", verdict ? count(verdict.num_shared_tokens) : "–"],
    ["gives up memory", verdict && verdict.victim_rank !== null ? `as number ${verdict.victim_rank}` : "–"],
    ["prefill server", facts.prefill_server || "–"],
    ["decode server", facts.decode_server || "–"],
    ["attempts", count(facts.num_attempts)],
    ["commit after", since(commitMs)],
    ["first token, from the commit", firstMs != null && commitMs != null ? seconds(firstMs - commitMs) : "–"],
    ["hand-off", facts.handoff === "done" ? `done after ${since(moments.handoff_done_ms)}` : facts.handoff],
    ["tokens of the answer", count(facts.num_output_tokens)],
    ["prefill before the commit", overlapOf(stream)],
    ["end", facts.ended_ms === null ? "–" : `${facts.state} after ${since(facts.ended_ms)}`],
  ];
  if (facts.error) entries.push(["error", facts.error]);
  pairs(details.list, entries);
  const tables = [
    table("Segments", ["", "arrived", "sent", "computed"], rowsOf(stream.segments), ([number, ...times]) => [number, ...times.map(since)]),
    table("Prefill", ["", "from", "for", "tokens", "why"], rowsOf(stream.runs), ([number, startMs, endMs, tokens, reason]) => [
      number, since(startMs), seconds(endMs - startMs), count(tokens), words(reason)]),
    table("KV lost", ["", "at", "came back by", "tokens", "why"], rowsOf(stream.preemptions), ([number, atMs, kind, tokens, reason]) => [
      number, since(atMs), kind, count(tokens), words(reason)]),
  ];
  details.tables.replaceChildren(...tables.filter(Boolean));
}

// The share of prefill that was hidden under retrieval; not known before the runs are.
function overlapOf(stream) {
  const commitMs = stream.moments.commit_ms;
  let hiddenMs = 0;
  let totalMs = 0;
  for (const [startMs, endMs] of stream.runs.values()) {
    totalMs += endMs - startMs;
    hiddenMs += Math.max(0, Math.min(endMs, commitMs ?? endMs) - startMs);
  }
  return totalMs > 0 ? `${Math.round((100 * hiddenMs) / totalMs)} %` : "–";
}

function rowsOf(rows) {
  return [...rows.entries()].map(([number, values]) => [number, ...values]).sort((a, b) => a[0] - b[0]);
}

function table(title, columns, rows, cellsOf) {
  if (!rows.length) return null;
  const made = element("table");
  const left = rows.length > MOST_SHOWN_ROWS ? `, the last ${MOST_SHOWN_ROWS} known` : "";
  made.append(element("caption", "", `${title}${left}`));
  const head = element("tr");
  head.append(...columns.map((name) => element("th", "", name)));
  const body = rows.slice(-MOST_SHOWN_ROWS).map((row) => {
    const line = element("tr");
    line.append(...cellsOf(row).map((cell) => element("td", "", String(cell))));
    return line;
  });
  made.append(head, ...body);
  const box = element("div");
  box.append(made);
  return box;
}

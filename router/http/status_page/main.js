
// Puts the page together: what the user chooses, what the router says, and when to draw.

const DRAW_INTERVAL_MS = 100;
const CALM_INTERVAL_MS = 1000;
const HIDDEN_AFTER_MS = 30000; // a tab in the background for so long asks for nothing
const SEARCH_PAUSE_MS = 300;

const byId = (id) => document.getElementById(id);
const model = new Model();
const rows = new StreamRows(byId("rows"));
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const choices = ["search", "show", "sort", "limit", "span"];
let paused = false;
let drawnAt = 0;
let frozen = false;
let hiddenTimer = 0;
let searchTimer = 0;

const reader = new EventReader({
  event(kind, data) {
    model.apply(kind, data);
    showState("live", `live, ${clockTime(model.epochMs + model.nowMs)}`);
    show();
  },
  state: showState,
  refused(text) {
    showState("lost", text);
    byId("key-why").textContent = `${text}. The key stays in this tab and is sent as a header only.`;
    toggleKeyForm(true);
  },
});

function showState(name, text) {
  setText(byId("link"), text);
  setClass(byId("link"), name);
}

function connect() {
  if (paused) return;
  if (!model.hasData) showState("lost", "connecting");
  reader.start({
    search: byId("search").value.trim(),
    show: byId("show").value,
    sort: byId("sort").value,
    limit: byId("limit").value,
  });
}

function setPaused(value) {
  paused = value;
  byId("pause").setAttribute("aria-pressed", String(paused));
  setText(byId("pause"), paused ? "Go on" : "Pause");
  if (!paused) return connect();
  reader.stop();
  frozen = true;
  showState("lost", `paused at ${clockTime(model.epochMs + model.nowMs)}`);
}

function show() {
  frozen = false;
  const { cluster, selected } = model;
  if (cluster) {
    setText(byId("model"), `${cluster.model}${cluster.ready ? "" : ", not ready"}`);
    document.title = `streamfill: ${cluster.num_open} open`;
  }
  showServers(model);
  rows.arrange(model);
  if (cluster && selected) {
    const outcomes = Object.entries(cluster.num_by_outcome).map(([name, number]) => `${count(number)} ${name.toLowerCase()}`);
    const shown = selected.order.length < selected.num_matching ? `${count(selected.order.length)} of ${count(selected.num_matching)} shown` : `${count(selected.order.length)} shown`;
    const own = cluster.sees_all ? "" : ", of your tenant";
    const ended = outcomes.length ? `; ended: ${outcomes.join(", ")}` : "";
    setText(byId("count"), `${shown}${own}. In the cluster ${count(cluster.num_open)} open${ended}`);
    byId("empty").hidden = selected.order.length > 0;
    setText(byId("empty"), selected.num_visible ? "No stream is like this." : "No streams. They appear here as clients open them.");
  }
  rows.fill(model);
  draw();
}

function draw() {
  if (document.hidden || !model.hasData) return;
  drawnAt = performance.now();
  const spanMs = 1000 * Number(byId("span").value);
  const range = rows.draw(model, spanMs);
  drawAxis(byId("axis").firstElementChild, range, "now");
}

function animate(at) {
  const interval = calm.matches ? CALM_INTERVAL_MS : DRAW_INTERVAL_MS;
  const isOld = performance.now() - model.heardAt > MOST_EXTRAPOLATED_MS;
  if (!frozen && !isOld && at - drawnAt >= interval) draw();
  requestAnimationFrame(animate);
}

function toggleKeyForm(open) {
  byId("key-form").hidden = !open;
  byId("key-change").setAttribute("aria-expanded", String(open));
  if (open) byId("key").focus();
}

byId("pause").addEventListener("click", () => setPaused(!paused));
byId("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
  draw();
});
byId("key-change").addEventListener("click", () => toggleKeyForm(byId("key-form").hidden));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  reader.key = byId("key").value.trim();
  byId("key").value = "";
  keep("key", byId("key-keep").checked ? reader.key : "");
  toggleKeyForm(false);
  model.clear();
  if (paused) setPaused(false);
  else connect();
});
byId("filter").addEventListener("submit", (event) => event.preventDefault());
byId("search").addEventListener("input", () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(connect, SEARCH_PAUSE_MS);
});
for (const id of ["show", "sort", "limit"]) byId(id).addEventListener("change", connect);
for (const id of choices) byId(id).addEventListener("change", () => keep(id, byId(id).value));
byId("span").addEventListener("change", draw);
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readPalette();
  draw();
});
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiddenTimer);
  if (document.hidden) hiddenTimer = setTimeout(() => reader.stop(), HIDDEN_AFTER_MS);
  else if (performance.now() - model.heardAt > HIDDEN_AFTER_MS / 2) connect();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "p" && !typing) setPaused(!paused);
  else if (event.key === "/" && !typing) {
    event.preventDefault();
    byId("search").focus();
  } else if (event.key === "Escape" && event.target === byId("search")) byId("search").blur();
  else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && !typing && !event.target.closest(".row")) {
    rows.list.querySelector(".row > button[tabindex='0']")?.focus();
    event.preventDefault();
  }
});
rows.changed = () => {
  rows.fill(model);
  draw();
};
for (const id of choices) if (kept(id)) byId(id).value = kept(id);
reader.key = kept("key");
setTheme(kept("theme"));
connect();
requestAnimationFrame(animate);


// The rows of streams: only those on the screen are drawn and filled.

const GOOD_STATES = new Set(["DECODING", "DONE"]);
const BAD_STATES = new Set(["FAILED", "REJECTED", "DEADLINE"]);

class StreamRows {
  constructor(list) {
    this.list = list;
    this.rows = new Map();
    this.order = [];
    this.openId = "";
    this.details = null;
    this.observer = new IntersectionObserver((entries) => this.seen(entries), { rootMargin: "150px" });
    list.addEventListener("click", (event) => this.clicked(event));
    list.addEventListener("keydown", (event) => this.pressed(event));
    list.addEventListener("focusin", (event) => this.focused(event));
  }

  arrange(model) {
    if (this.order === model.order) return;
    this.order = model.order;
    const wanted = new Set(model.order);
    const focused = document.activeElement?.closest?.(".row")?.dataset.id;
    for (const [id, row] of this.rows) if (!wanted.has(id)) this.forget(id, row);
    let place = this.list.firstElementChild;
    for (const id of model.order) {
      let row = this.rows.get(id);
      if (!row) {
        row = newRow(id);
        this.rows.set(id, row);
        this.observer.observe(row.root);
      }
      if (row.root === place) place = place.nextElementSibling;
      else this.list.insertBefore(row.root, place);
    }
    const reached = this.rows.get(focused)?.button ?? this.rows.get(model.order[0])?.button;
    for (const row of this.rows.values()) row.button.tabIndex = row.button === reached ? 0 : -1;
    if (focused && document.activeElement === document.body) reached?.focus();
  }

  fill(model) {
    for (const [id, row] of this.rows) {
      const stream = model.streams.get(id);
      if (row.visible && stream) fillRow(row, stream);
    }
    const open = model.streams.get(this.openId);
    if (open && this.details) fillDetails(this.details, open, model);
  }

  draw(model, spanMs) {
    const nowMs = model.timeNow();
    const range = { fromMs: nowMs - spanMs, toMs: nowMs };
    for (const [id, row] of this.rows) {
      const stream = model.streams.get(id);
      if (row.visible && stream) drawStream(row.canvas, stream, range, nowMs);
    }
    const open = model.streams.get(this.openId);
    if (open && this.details) drawDetails(this.details, open, nowMs);
    return range;
  }

  seen(entries) {
    for (const entry of entries) {
      const row = this.rows.get(entry.target.dataset.id);
      if (!row) continue;
      row.visible = entry.isIntersecting;
      row.version = -1;
      if (!row.visible) row.canvas.width = 0; // gives its memory back
    }
    this.changed?.();
  }

  forget(id, row) {
    if (id === this.openId) this.close();
    this.observer.unobserve(row.root);
    row.root.remove();
    this.rows.delete(id);
  }

  clicked(event) {
    const root = event.target.closest(".row > button")?.parentElement;
    if (!root) return;
    if (root.dataset.id === this.openId) this.close();
    else this.open(root.dataset.id);
    this.changed?.();
  }

  open(id) {
    this.close();
    const row = this.rows.get(id);
    this.openId = id;
    this.details = newDetails();
    this.details.root.id = `details-${id}`;
    row.button.setAttribute("aria-expanded", "true");
    row.button.setAttribute("aria-controls", this.details.root.id);
    row.root.append(this.details.root);
  }

  close() {
    const button = this.rows.get(this.openId)?.button;
    button?.setAttribute("aria-expanded", "false");
    button?.removeAttribute("aria-controls");
    this.details?.root.remove();
    this.details = null;
    this.openId = "";
  }

  pressed(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape" && this.openId) {
      this.rows.get(this.openId)?.button.focus();
      this.close();
    } else if (event.key in steps && event.target.matches(".row > button")) {
      const at = this.order.indexOf(event.target.parentElement.dataset.id);
      const next = Math.max(0, Math.min(this.order.length - 1, at + steps[event.key]));
      this.rows.get(this.order[next])?.button.focus();
      event.preventDefault();
    }
  }

  focused(event) {
    if (!event.target.matches(".row > button")) return;
    for (const row of this.rows.values()) row.button.tabIndex = row.button === event.target ? 0 : -1;
  }
}

function newRow(id) {
  const row = { root: element("li", "row"), button: element("button"), visible: false, version: -1 };
  row.root.dataset.id = id;
  row.button.type = "button";
  row.button.tabIndex = -1;
  row.button.setAttribute("aria-expanded", "false");
  const who = element("span", "who");
  row.state = element("span", "badge");
  row.name = element("span", "name");
  row.tokens = element("span", "tokens");
  const short = element("b", "", shortId(id));
  short.title = id;
  who.append(short, row.state, row.name, row.tokens);
  row.canvas = element("canvas");
  row.canvas.setAttribute("aria-hidden", "true");
  row.why = element("span", "why");
  row.button.append(who, row.canvas, row.why);
  row.root.append(row.button);
  return row;
}

function fillRow(row, stream) {
  if (row.version === stream.version) return;
  row.version = stream.version;
  const { facts, verdict } = stream;
  setText(row.state, facts.state.toLowerCase());
  const mood = BAD_STATES.has(facts.state) ? " warn" : GOOD_STATES.has(facts.state) ? " good" : "";
  setClass(row.state, `badge${mood}`);
  setText(row.name, [facts.request_id, facts.tenant && `(${facts.tenant})`].filter(Boolean).join(" "));
  row.name.title = facts.request_id;
  const answer = facts.num_output_tokens ? `, answer ${count(facts.num_output_tokens)}` : "";
  const context = `${count(facts.num_computed_tokens)} of ${count(facts.num_known_tokens)} computed`;
  setText(row.tokens, `${facts.num_known_tokens ? context : "no context yet"}${answer}`);
  setText(row.why, whyOf(facts, verdict));
  setClass(row.why, BAD_STATES.has(facts.state) ? "why lost" : "why");
}

function whyOf(facts, verdict) {
  if (facts.ended_ms !== null) return facts.error || `ended after ${seconds(facts.ended_ms - facts.opened_ms)}`;
  const attempts = facts.num_attempts > 1 ? `attempt ${facts.num_attempts}: ` : "";
  if (verdict) return `${attempts}${verdict.reason} (${verdict.server})`;
  return `${attempts}${facts.decode_server || facts.prefill_server || "no server yet"}`;
}

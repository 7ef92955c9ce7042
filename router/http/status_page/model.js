
// What is known of the cluster: the first event is all of it, later ones are what changed.

const MAX_ROWS = 200; // of each kind and stream, as the router keeps them
const MOST_EXTRAPOLATED_MS = 1500; // behind the newest event; more would be made up
const ROW_KINDS = ["segments", "runs", "preemptions", "progress"];

class Model {
  constructor() {
    this.clear();
  }

  clear() {
    this.streams = new Map();
    this.order = [];
    this.servers = [];
    this.cluster = null;
    this.selected = null;
    this.nowMs = 0;
    this.epochMs = 0;
    this.heardAt = 0;
    this.rates = new Map();
    this.earlier = new Map();
  }

  get hasData() {
    return this.heardAt > 0;
  }

  // The router's time now, in ms since its start; it goes on for a moment without news.
  timeNow() {
    const since = performance.now() - this.heardAt;
    return this.nowMs + Math.max(0, Math.min(since, MOST_EXTRAPOLATED_MS));
  }

  apply(kind, frame) {
    if (kind === "snapshot") this.clear();
    this.heardAt = performance.now();
    this.nowMs = frame.now_ms;
    this.epochMs = frame.epoch_ms;
    if (frame.cluster) this.cluster = frame.cluster;
    if (frame.servers) this.takeServers(frame.servers);
    for (const change of frame.streams ?? []) this.takeStream(change);
    if (!frame.selected) return;
    this.selected = frame.selected;
    this.order = frame.selected.order;
    const kept = new Set(this.order);
    for (const id of this.streams.keys()) if (!kept.has(id)) this.streams.delete(id);
  }

  takeServers(servers) {
    this.servers = servers;
    for (const server of servers) {
      const key = `${server.id} ${server.pid}`;
      const before = this.earlier.get(key);
      const elapsedMs = before ? this.nowMs - before.atMs : 0;
      if (before && elapsedMs < 2000) continue; // a rate over less jumps with each step
      if (before) {
        const computed = server.num_computed_tokens - before.computed;
        this.rates.set(server.id, (1000 * computed) / elapsedMs);
      }
      this.earlier.set(key, { atMs: this.nowMs, computed: server.num_computed_tokens });
    }
  }

  takeStream(change) {
    let stream = this.streams.get(change.id);
    if (!stream || change.is_new) {
      stream = { id: change.id, facts: {}, verdict: null, moments: {} };
      for (const kind of ROW_KINDS) stream[kind] = new Map();
      this.streams.set(change.id, stream);
    }
    if (change.facts) Object.assign(stream.facts, change.facts);
    if (change.verdict) stream.verdict = change.verdict;
    if (change.moments) stream.moments = change.moments;
    for (const kind of ROW_KINDS) {
      for (const [number, ...values] of change[kind] ?? []) stream[kind].set(number, values);
      while (stream[kind].size > MAX_ROWS) stream[kind].delete(Math.min(...stream[kind].keys()));
    }
    if (stream.facts.ended_ms !== null) stream.verdict = null;
    stream.version = (stream.version ?? 0) + 1;
  }
}


// Reads the router's events with fetch, since EventSource cannot send a key in a header, and a key
// in a URL would end in logs.

const FIRST_PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 15000;
const SILENT_MS = 15000; // the router speaks twice a second
const MAX_EVENT_CHARS = 64 * 1024 * 1024;

class EventReader {
  // handlers: event(kind, data), state(name, text), refused(text)
  constructor(handlers) {
    this.handlers = handlers;
    this.run = 0;
    this.abort = null;
    this.key = "";
  }

  start(parameters) {
    this.stop();
    this.loop(new URLSearchParams(parameters).toString(), this.run);
  }

  stop() {
    this.run += 1;
    this.abort?.abort();
  }

  async loop(query, run) {
    let pauseMs = FIRST_PAUSE_MS;
    while (run === this.run) {
      let text;
      try {
        const heard = await this.read(query, run);
        if (run !== this.run) return;
        if (heard.refused) {
          this.handlers.refused(heard.text);
          return;
        }
        text = heard.text;
        pauseMs = heard.any ? FIRST_PAUSE_MS : pauseMs;
        pauseMs = Math.max(pauseMs, heard.waitMs ?? 0);
      } catch (error) {
        if (run !== this.run) return;
        text = error.name === "AbortError" ? "nothing heard of the router" : String(error.message);
      }
      this.handlers.state("lost", `${text}; again in ${Math.round(pauseMs / 1000)} s`);
      await new Promise((resolve) => setTimeout(resolve, pauseMs));
      pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS);
    }
  }

  async read(query, run) {
    const abort = new AbortController();
    this.abort = abort;
    let alarm = setTimeout(() => abort.abort(), SILENT_MS);
    let any = false;
    let ending = "the router ended the connection";
    try {
      const headers = this.key ? { authorization: `Bearer ${this.key}` } : {};
      const options = { headers, signal: abort.signal, cache: "no-store", credentials: "omit" };
      const reply = await fetch(`status/events?${query}`, options);
      if (!reply.ok) return await refusal(reply);
      const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
      let buffer = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done || run !== this.run) return { any, text: ending };
        clearTimeout(alarm);
        alarm = setTimeout(() => abort.abort(), SILENT_MS);
        buffer += value;
        const parts = buffer.split("\n\n");
        buffer = parts.pop();
        if (buffer.length > MAX_EVENT_CHARS) throw new Error("an event has no end");
        for (const part of parts) {
          const { kind, data } = parsed(part);
          if (kind === "end") ending = data.error.message;
          else this.handlers.event(kind, data);
          any = true;
        }
      }
    } finally {
      clearTimeout(alarm);
      abort.abort();
    }
  }
}

function parsed(part) {
  let kind = "message";
  let data = "";
  for (const line of part.split("\n")) {
    if (line.startsWith("event: ")) kind = line.slice(7);
    else if (line.startsWith("data: ")) data += line.slice(6);
  }
  return { kind, data: JSON.parse(data) };
}

async function refusal(reply) {
  let text = `the router answers ${reply.status}`;
  try {
    text = (await reply.json()).error.message;
  } catch {
    // Something between us and the router answered in its own words.
  }
  const waitMs = 1000 * Number(reply.headers.get("retry-after") ?? 0);
  return { refused: reply.status === 401 || reply.status === 403, text, waitMs, any: false };
}


// A stream's life on a canvas, in three lanes: context as it arrives, prefill, and the answer.

const STEPS_MS = [100, 200, 500, 1000, 2000, 5000, 10000, 30000, 60000, 300000, 600000, 3600000];
const TICK_GAP_PX = 90;

// The context of a canvas whose pixels are those of the screen, and its size in CSS pixels.
function prepared(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
  if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

function tickStep(spanMs, width) {
  const wanted = (spanMs * TICK_GAP_PX) / Math.max(1, width);
  return STEPS_MS.find((step) => step >= wanted) ?? STEPS_MS[STEPS_MS.length - 1];
}

// A scale from time to place, clipped to the canvas.
function scaleOf(range, width) {
  const perMs = width / Math.max(1, range.toMs - range.fromMs);
  return (ms) => Math.max(-4, Math.min(width + 4, (ms - range.fromMs) * perMs));
}

// A time as short as the ticks allow.
function tickLabel(ms, step) {
  if (step >= 60000) return `${Math.round(ms / 60000)} min`;
  return step >= 1000 ? `${Math.round(ms / 1000)} s` : `${(ms / 1000).toFixed(1)} s`;
}

function drawAxis(canvas, range, zeroName) {
  const { context, width, height } = prepared(canvas);
  const x = scaleOf(range, width);
  const step = tickStep(range.toMs - range.fromMs, width);
  const zero = range.zeroMs ?? range.toMs;
  context.font = "11px system-ui, sans-serif";
  context.fillStyle = palette.soft;
  context.strokeStyle = palette.line;
  context.textBaseline = "middle";
  const first = Math.ceil((range.fromMs - zero) / step);
  const last = Math.floor((range.toMs - zero) / step);
  for (let n = first; n <= last; n += 1) {
    const at = Math.round(x(zero + n * step)) + 0.5;
    context.beginPath();
    context.moveTo(at, height - 6);
    context.lineTo(at, height);
    context.stroke();
    const text = n === 0 ? zeroName : tickLabel(n * step, step).replace("-", "−");
    const half = context.measureText(text).width / 2;
    context.textAlign = "center";
    context.fillText(text, Math.max(half, Math.min(width - half, at)), height / 2 - 2);
  }
}

function drawGrid(context, range, x, height) {
  const step = tickStep(range.toMs - range.fromMs, context.canvas.clientWidth);
  const zero = range.zeroMs ?? range.toMs;
  context.fillStyle = palette.grid;
  const last = Math.floor((range.toMs - zero) / step);
  for (let n = Math.ceil((range.fromMs - zero) / step); n <= last; n += 1) {
    context.fillRect(Math.round(x(zero + n * step)), 0, 1, height);
  }
}

function drawStream(canvas, stream, range, nowMs) {
  const { context, width, height } = prepared(canvas);
  const x = scaleOf(range, width);
  const lane = height / 3;
  const { facts, moments } = stream;
  const untilMs = facts.ended_ms ?? nowMs;
  const bar = (fromMs, toMs, top, thickness, colour, alpha = 1) => {
    if (toMs < range.fromMs || fromMs > range.toMs) return;
    const left = x(fromMs);
    context.globalAlpha = alpha;
    context.fillStyle = colour;
    context.fillRect(left, top, Math.max(1.5, x(toMs) - left), thickness);
    context.globalAlpha = 1;
  };
  drawGrid(context, range, x, height);
  drawContext(stream, bar, lane, untilMs);
  drawPrefill(stream, bar, lane, untilMs);
  drawAnswer(stream, bar, lane, untilMs);
  if (moments.commit_ms != null) bar(moments.commit_ms, moments.commit_ms, 0, 2 * lane, palette.accent);
  for (const [atMs] of stream.preemptions.values()) dot(context, x(atMs), 1.5 * lane, lane / 4);
  if (facts.ended_ms != null && facts.state !== "DONE") {
    const colour = facts.state === "ABORTED" ? palette.soft : palette.lost;
    cross(context, x(facts.ended_ms), 2.5 * lane, lane / 3, colour);
  }
}

function drawContext(stream, bar, lane, untilMs) {
  const { facts, moments, segments } = stream;
  const endMs = moments.commit_ms ?? untilMs;
  bar(facts.opened_ms, endMs, lane / 2 - 0.5, 1.5, palette.soft, 0.6);
  for (const [receivedMs] of segments.values()) {
    if (receivedMs !== null) bar(receivedMs, receivedMs, 1, lane - 2, palette.text);
  }
}

function drawPrefill(stream, bar, lane, untilMs) {
  const { facts, moments, segments, runs, progress } = stream;
  const top = lane + 1;
  const thickness = lane - 2;
  const readyMs = moments.first_token_ms ?? untilMs;
  for (const [receivedMs, sentMs, computedMs] of segments.values()) {
    const fromMs = sentMs ?? receivedMs;
    if (fromMs !== null) bar(fromMs, Math.max(fromMs, computedMs ?? readyMs), top, thickness, palette.waiting);
  }
  if (moments.commit_ms != null) bar(moments.commit_ms, readyMs, top, thickness, palette.waiting);
  for (const [startMs, endMs] of runs.values()) bar(startMs, endMs, top, thickness, palette.compute);
  if (runs.size === 0 && facts.state !== "REJECTED") {
    for (const [afterMs, seenMs] of progress.values()) bar(afterMs, seenMs, top, thickness, palette.compute, 0.5);
  }
}

function drawAnswer(stream, bar, lane, untilMs) {
  const { facts, moments } = stream;
  const top = 2 * lane + 1;
  const thickness = lane - 2;
  if (moments.first_token_ms != null) {
    const endMs = facts.ended_ms === null ? untilMs : moments.newest_token_ms;
    bar(moments.first_token_ms, endMs, top, thickness, palette.decode);
    bar(moments.first_token_ms, moments.first_token_ms, lane, 2 * lane, palette.text);
  }
  if (moments.handoff_started_ms != null) {
    const failed = facts.handoff.startsWith("failed");
    const doneMs = moments.handoff_done_ms ?? (failed ? moments.handoff_started_ms : untilMs);
    bar(moments.handoff_started_ms, doneMs, top, thickness / 2, failed ? palette.lost : palette.handoff);
  }
}

function dot(context, x, y, radius) {
  context.fillStyle = palette.lost;
  context.beginPath();
  context.arc(x, y, Math.max(2, radius), 0, 2 * Math.PI);
  context.fill();
}

function cross(context, x, y, size, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(x - size, y - size);
  context.lineTo(x + size, y + size);
  context.moveTo(x + size, y - size);
  context.lineTo(x - size, y + size);
  context.stroke();
  context.lineWidth = 1;
}

// The timeline of a request: for each image, when each stage waited, had its tensors brought, computed and stored.

import { call, follow } from "./api.js";
import { STAGES, STATE_OF_STAGE } from "./constants.js";
import { CROSS, el, makeIcon, setText } from "./dom.js";

const STAGE_OF = { PENDING: "encoder", ...Object.fromEntries(STAGES.map((stage) => [STATE_OF_STAGE[stage], stage])) };
const RELOAD_MS = 250;
const REDRAW_MS = 100;
const MOST_JOBS = 8;
const LEAST_S = 0.0005; // shorter phases of a run are left out

/** Return the rows of one image: for each stage its phases, in seconds since the request was made.
 *
 * A phase is `{phase, from, to, instance, attempt, text, open, lost, steps}`: queued, transfer or computing.
 */
export function rowsOf(job, createdAt, now) {
  const rows = new Map(STAGES.map((stage) => [stage, []]));
  let since = createdAt;
  for (const run of job.runs) {
    const end = run.ended_at || now;
    const lost = Boolean(run.reason);
    const reason = run.reason.replace(`${run.instance}: `, "");
    const about = { instance: run.instance, attempt: run.attempt, lost };
    const loaded = run.loaded_at || run.started_at || end;
    const started = run.started_at || end;
    const computed = run.computed_at || end;
    const phases = [
      ["queued", since, run.assigned_at, "waited for an instance"],
      ["transfer", run.assigned_at, loaded, run.stage === "encoder" ? "was handed over" : "its tensors were brought"],
      ["queued", loaded, started, "waited on the instance for its turn"],
      ["computing", started, computed, lost ? `computed, and was lost: ${reason}` : "computed"],
      ["transfer", computed, run.ended_at || (run.computed_at ? now : computed), run.stage === "decoder" ? "its file was written" : "its outputs were stored"],
    ];
    const kept = phases.filter(([, from, to]) => to - from >= LEAST_S);
    const row = rows.get(run.stage) ?? rows.get("denoiser");
    for (const [phase, from, to, text] of kept) {
      const open = !run.ended_at && to === now;
      const steps = phase === "computing" ? run.steps.map(({ step, at }) => ({ step, at: at - createdAt })) : [];
      const who = phase === "queued" && to === run.assigned_at ? { instance: "", attempt: run.attempt, lost: false } : about;
      row.push({ ...who, phase, from: from - createdAt, to: to - createdAt, text: open ? presentOf(text) : text, open, steps });
    }
    if (lost && kept.length) row.push({ ...about, phase: "lost", from: end - createdAt, to: end - createdAt, text: reason, steps: [] });
    since = end;
  }
  const last = job.runs.at(-1);
  const waits = STAGE_OF[job.state.replace(/_WAITING$/, "")];
  if (waits && (!last || last.ended_at)) {
    rows.get(waits).push({ phase: "queued", from: since - createdAt, to: now - createdAt, instance: "", attempt: job.attempts, text: "waits for an instance", open: true, lost: false, steps: [] });
  }
  return STAGES.map((stage) => ({ stage, phases: rows.get(stage) }));
}

const PRESENT = {
  "waited on the instance for its turn": "waits on the instance for its turn",
  "was handed over": "is handed over",
  "its tensors were brought": "its tensors are brought",
  computed: "computes",
  "its outputs were stored": "its outputs are stored",
  "its file was written": "its file is written",
};
const presentOf = (text) => PRESENT[text] ?? text;

/** Return the least that this clock must be put forward to agree with a time of the server in whole seconds, all in ms. */
export function offsetOf(date, asked, answered) {
  if (Number.isNaN(date)) return 0;
  return Math.min(Math.max(0, date - answered), date + 1000 - asked);
}

/** Return the distance of the marks of an axis, in seconds: of 1, 2 or 5 units, so that there are 3 to 6 of them. */
export function spacingOf(length, most = 6) {
  const unit = 10 ** Math.floor(Math.log10(length / most));
  return unit * [1, 2, 5, 10].find((factor) => length / (factor * unit) <= most);
}

/** Show the timeline of a request in an element, and go on while it runs; returns the function that stops it. */
export function mountTimeline(root, requestId) {
  const timeline = new Timeline(root, requestId);
  return () => timeline.stop();
}

class Timeline {
  constructor(root, requestId) {
    this.path = `v1/requests/${encodeURIComponent(requestId)}`;
    this.following = new AbortController();
    this.head = el("p", { class: "timeline-head" }, "Loading …");
    this.chart = el("div", { class: "timeline-chart" });
    this.tip = el("div", { class: "timeline-tip", hidden: true });
    this.spoken = el("p", { class: "visually-hidden", "aria-live": "polite" });
    this.times = el("details", { class: "timeline-times" }, el("summary", {}, "All times"));
    this.table = el("tbody");
    this.times.append(
      el("div", { class: "timeline-scroll", tabindex: 0, role: "region", "aria-label": "All times" },
        el("table", {},
          el("thead", {}, el("tr", {}, ...["Image", "Stage", "What", "Instance", "From", "Seconds"].map((text) => el("th", { scope: "col" }, text)))),
          this.table)),
    );
    this.jobs = new Map();
    this.node = el("div", { class: "request-timeline" },
      el("div", { class: "timeline-body" }, this.head, this.chart, (this.legend = makeLegend()), this.times, this.spoken));
    root.replaceChildren(this.node);
    this.follow();
  }

  stop() {
    this.following.abort();
    clearInterval(this.redrawing);
    clearTimeout(this.reloading);
    this.node.remove();
  }

  async follow() {
    const { signal } = this.following;
    try {
      await this.load();
      if (!this.request.terminal) {
        this.redrawing = setInterval(() => this.draw(), REDRAW_MS);
        await follow(`${this.path}/events`, (name, data) => this.take(name, data), signal);
      }
    } catch (error) {
      this.fail(error);
    } finally {
      clearInterval(this.redrawing);
    }
  }

  /** Say what has gone wrong, until the next answer. */
  fail(error) {
    if (this.following.signal.aborted) return;
    this.problem = error.message;
    setText(this.head, this.problem);
  }

  take(name, data) {
    if (name === "ended") this.show(data);
    else this.reloading ??= setTimeout(() => this.load().catch((error) => this.request.terminal || this.fail(error)).finally(() => (this.reloading = null)), RELOAD_MS);
  }

  async load() {
    const asked = Date.now();
    const answer = await call(this.path, { signal: this.following.signal });
    const request = await answer.json();
    this.offset = offsetOf(Date.parse(answer.headers.get("Date")), asked, Date.now());
    if (!this.request?.terminal) this.show(request);
  }

  show(request) {
    this.request = request;
    this.problem = "";
    if (request.terminal) clearInterval(this.redrawing);
    this.draw();
    this.fillTable();
  }

  now() {
    return this.request.finished_at || (Date.now() + this.offset) / 1000;
  }

  draw() {
    const { request } = this;
    const now = this.now();
    const length = Math.max(now - request.created_at, 0.001);
    const runs = request.units.some((job) => job.runs.length);
    setText(this.head, this.problem || `${wordOf(request)} ${request.terminal ? "in" : "for"} ${secondsOf(length)}${runs || !request.terminal ? "" : ": its times were not recorded"}`);
    const shown = request.units.slice(0, MOST_JOBS);
    for (const job of shown) {
      if (!this.jobs.has(job.index)) this.jobs.set(job.index, this.addJob(job, request.units.length > 1));
      this.jobs.get(job.index)(rowsOf(job, request.created_at, now), length, job);
    }
    this.legend.lastChild.hidden = !request.units.some((job) => job.runs.some(({ reason }) => reason));
    if (!this.axis) {
      this.axis = el("div", { class: "timeline-axis", "aria-hidden": "true" });
      this.more = el("p", { class: "timeline-title", hidden: shown.length === request.units.length }, `and ${request.units.length - shown.length} more images`);
      this.chart.append(this.axis, this.more, this.tip);
    }
    this.drawAxis(length);
  }

  drawAxis(length) {
    const spacing = spacingOf(length);
    this.chart.style.setProperty("--grid", `${(100 * spacing) / length}%`);
    const marks = Array.from({ length: Math.floor(length / spacing + 1e-9) + 1 }, (_, index) => index * spacing);
    while (this.axis.children.length > marks.length) this.axis.lastChild.remove();
    while (this.axis.children.length < marks.length) this.axis.append(el("span"));
    marks.forEach((at, index) => {
      const mark = this.axis.children[index];
      mark.style.setProperty("--at", at / length);
      mark.hidden = at / length > 0.96 && index > 0;
      setText(mark, at ? markOf(at, spacing) : "0");
    });
  }

  addJob(job, named) {
    const rows = new Map(STAGES.map((stage) => [stage, new Row(stage, named ? `image ${job.index + 1}, ` : "", this)]));
    const node = el("div", { class: "timeline-job", role: "group", "aria-label": named ? `Image ${job.index + 1}` : "Stages" },
      named ? el("p", { class: "timeline-title" }, `Image ${job.index + 1}, seed ${job.seed}`) : null,
      ...[...rows.values()].map((row) => row.node));
    this.chart.insertBefore(node, this.axis ?? null);
    return (data, length, now) => {
      const cached = now.history.some(({ reason }) => reason === "prompt cache");
      for (const { stage, phases } of data) rows.get(stage).show(phases, length, stage === "encoder" && cached ? "from the prompt cache" : "");
    };
  }

  fillTable() {
    const now = this.now();
    this.table.replaceChildren(
      ...this.request.units.slice(0, MOST_JOBS).flatMap((job) =>
        rowsOf(job, this.request.created_at, now).flatMap(({ stage, phases }) =>
          phases.filter(({ phase }) => phase !== "lost").map((phase) =>
            el("tr", {},
              el("td", {}, String(job.index + 1)),
              el("td", {}, stage),
              el("td", {}, phase.text),
              el("td", {}, phase.instance),
              el("td", { class: "number" }, phase.from.toFixed(3)),
              el("td", { class: "number" }, phase.open ? "…" : (phase.to - phase.from).toFixed(3)))))),
    );
  }
}

/** The phases of one stage of one image: a track to hover, or to focus and go through with the arrow keys. */
class Row {
  constructor(stage, prefix, { tip, spoken }) {
    this.stage = stage;
    this.prefix = prefix;
    this.tip = tip;
    this.spoken = spoken;
    this.phases = [];
    this.chosen = -1;
    this.track = el("div", {
      class: "timeline-track",
      role: "img",
      tabindex: 0,
      onpointermove: (event) => this.choose(this.nearest(event)),
      onpointerleave: () => this.choose(-1),
      onfocus: () => this.track.matches(":focus-visible") && this.choose(this.longest()),
      onblur: () => this.choose(-1),
      onkeydown: (event) => this.move(event),
    });
    this.note = el("span", { class: "timeline-note" });
    this.node = el("div", { class: "timeline-row", "data-stage": stage }, el("span", { class: "timeline-name", "aria-hidden": "true" }, stage), this.track);
  }

  show(phases, length, note) {
    this.phases = phases.filter(({ phase }) => phase !== "lost");
    this.length = length;
    const bars = [...this.track.querySelectorAll(":scope > .bar")];
    this.phases.forEach((phase, index) => {
      const bar = bars[index] ?? el("span", { class: "bar" });
      if (!bars[index]) this.track.append(bar);
      bar.dataset.phase = phase.phase;
      bar.dataset.lost = phase.lost;
      bar.dataset.open = phase.open && phase.phase === "computing";
      bar.dataset.chosen = index === this.chosen;
      bar.style.setProperty("--from", phase.from / length);
      bar.style.setProperty("--to", phase.to / length);
      showTicks(bar, phase);
    });
    bars.slice(this.phases.length).forEach((bar) => bar.remove());
    this.showLosses(phases.filter(({ phase }) => phase === "lost"), length);
    if (note && !this.phases.length) {
      setText(this.note, note);
      this.track.append(this.note);
    }
    const label = `${this.prefix}${this.stage}: ${this.phases.map(sentenceOf).join("; ") || note || "not yet"}`;
    if (this.labelled !== this.phases.length || !this.phases.some(({ open }) => open)) this.track.setAttribute("aria-label", label);
    this.labelled = this.phases.length;
    if (this.chosen >= 0) this.showTip();
  }

  showLosses(losses, length) {
    const marks = [...this.track.querySelectorAll(":scope > .lost-mark")];
    losses.forEach((loss, index) => {
      const mark = marks[index] ?? el("span", { class: "lost-mark" }, makeIcon(CROSS));
      if (!marks[index]) this.track.append(mark);
      mark.style.setProperty("--at", loss.from / length);
    });
    marks.slice(losses.length).forEach((mark) => mark.remove());
  }

  /** Return the phase under the pointer, or the one that is nearest to it: some are a pixel wide. */
  nearest({ clientX }) {
    const { left, width } = this.track.getBoundingClientRect();
    const at = ((clientX - left) / width) * this.length;
    const distances = this.phases.map(({ from, to }) => Math.max(from - at, at - to, 0));
    const best = distances.indexOf(Math.min(...distances));
    return distances[best] <= 0.03 * this.length ? best : -1;
  }

  longest() {
    return this.phases.reduce((best, { from, to }, index) => (best < 0 || to - from > this.phases[best].to - this.phases[best].from ? index : best), -1);
  }

  move(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape" && this.chosen >= 0) {
      event.stopPropagation(); // else it closes what the timeline is in
      event.preventDefault();
      this.choose(-1);
    } else if (by && this.phases.length) {
      event.preventDefault();
      event.stopPropagation(); // else it goes on to the next image
      this.choose(Math.min(Math.max(this.chosen + by, 0), this.phases.length - 1));
      this.spoken.textContent = sentenceOf(this.phases[this.chosen]);
    }
  }

  choose(index) {
    this.chosen = index;
    [...this.track.querySelectorAll(":scope > .bar")].forEach((bar, at) => (bar.dataset.chosen = at === index));
    this.tip.hidden = index < 0;
    if (index >= 0) this.showTip();
  }

  showTip() {
    const phase = this.phases[this.chosen];
    if (!phase) return;
    setText(this.tip, sentenceOf(phase));
    const chart = this.tip.parentElement.getBoundingClientRect();
    const track = this.track.getBoundingClientRect();
    const middle = track.left - chart.left + (track.width * (phase.from + phase.to)) / 2 / this.length;
    const width = this.tip.offsetWidth;
    this.tip.style.left = `${Math.min(Math.max(middle - width / 2, 0), chart.width - width)}px`;
    this.tip.style.top = `${track.bottom - chart.top + 6}px`;
  }
}

function showTicks(bar, { steps, from, to }) {
  const shown = steps.filter(({ at }) => at > from && at < to);
  while (bar.children.length > shown.length) bar.lastChild.remove();
  while (bar.children.length < shown.length) bar.append(el("i", { class: "tick" }));
  shown.forEach(({ at }, index) => bar.children[index].style.setProperty("--at", (at - from) / (to - from)));
}

/** Say a phase with its times. */
export function sentenceOf({ text, instance, attempt, from, to, open, steps }) {
  const parts = [`${instance ? `${instance}: ` : ""}${text}`, `${secondsOf(to - from)}${open ? " so far" : ""}`];
  parts.push(open ? `since ${secondsOf(from)}` : `from ${secondsOf(from)} to ${secondsOf(to)}`);
  if (steps.length) {
    const [first, last] = [steps[0], steps.at(-1)];
    const each = last.step > first.step ? `, ${secondsOf((last.at - first.at) / (last.step - first.step))} each` : "";
    parts.push(`${first.step === last.step ? `step ${first.step}` : `steps ${first.step} to ${last.step}`}${each}`);
  }
  if (attempt > 1) parts.push(`attempt ${attempt}`);
  return parts.join(", ");
}

function wordOf({ state, terminal }) {
  if (!terminal) return "Under way";
  return { DONE: "Done", FAILED: "Failed", TIMED_OUT: "Timed out", CANCELLED: "Cancelled" }[state] ?? state;
}

function secondsOf(number) {
  if (number < 0.01) return `${(number * 1000).toFixed(1)} ms`;
  if (number < 1) return `${Math.round(number * 1000)} ms`;
  if (number < 120) return `${number.toFixed(2)} s`;
  return `${Math.floor(number / 60)} min ${Math.round(number % 60)} s`;
}

function markOf(at, spacing) {
  if (spacing < 0.1) return `${Math.round(at * 1000)} ms`;
  if (spacing < 60) return `${at.toFixed(spacing < 1 ? 1 : 0)} s`;
  return `${(at / 60).toFixed(spacing % 60 ? 1 : 0)} min`;
}

function makeLegend() {
  const entries = [["queued", "waits"], ["transfer", "tensors move"], ["computing", "computes, steps marked"], ["computing", "was lost", true]];
  return el("p", { class: "timeline-legend" },
    entries.map(([phase, text, lost]) => el("span", {}, el("i", { class: "bar", "data-phase": phase, "data-lost": String(Boolean(lost)) }), text)));
}

// The gallery: what the server has made and is making, the newest first. Requests in progress are followed as they move.

import { call, follow, forgetMedia, getJson, mediaProblem, mediaUrl } from "./api.js";
import { STATE_OF_STAGE } from "./constants.js";
import { announce, duration, el } from "./dom.js";
import { forgetFiles } from "./kept.js";

const PAGE = 24;
const REFRESH_MS = 5000;
const STREAMS = 3; // browsers open six connections to a server, and the rest of the page needs some
const STATES = Object.values(STATE_OF_STAGE);
const WORDS = { ENCODER: ["an encoder", "Encoding"], DENOISING: ["a denoiser", "Denoising"], DECODER: ["a decoder", "Decoding"] };
const ENDS = { FAILED: "Failed", TIMED_OUT: "Timed out", CANCELLED: "Cancelled" };
const DONE = "DONE";

/** Say how far an image is: the share that is done of each of the three stages, and the words for it. */
export function progressOf({ state, step, total_steps: total }) {
  if (state === DONE) return { shares: [1, 1, 1], text: "Done" };
  if (ENDS[state]) return { shares: [0, 0, 0], text: ENDS[state] };
  const [stage, phase] = state.split("_");
  const at = STATES.indexOf(stage);
  if (at < 0) return { shares: [0, 0, 0], text: "Waiting" };
  const shares = STATES.map((_, index) => (index < at || (index === at && phase === DONE) ? 1 : 0));
  if (stage === "DENOISING" && total && phase !== DONE) shares[1] = step / total;
  if (phase === "WAITING") return { shares, text: `Waiting for ${WORDS[stage][0]}` };
  if (phase === "RUNNING" && stage !== "DENOISING") shares[at] = 0.5;
  const steps = stage === "DENOISING" && total ? ` ${step} of ${total}` : "";
  return { shares, text: `${WORDS[stage][1]}${steps}` };
}

/** The three panels that fill as the stages are done. */
export function makePanels() {
  const panels = [el("i"), el("i"), el("i")];
  const node = el("div", { class: "panels", role: "progressbar", "aria-label": "Progress", "aria-valuemax": 100 }, panels);
  return {
    node,
    show: ({ shares, text }) => {
      panels.forEach((panel, index) => panel.style.setProperty("--done", shares[index]));
      node.setAttribute("aria-valuenow", Math.round((10 * shares[0] + 80 * shares[1] + 10 * shares[2])));
      node.setAttribute("aria-valuetext", text);
    },
  };
}

/** Make the element that shows a file: image, video or sound. */
export async function makeMedia(artifact, alt, { large = false } = {}) {
  const src = await mediaUrl(artifact.name);
  const type = artifact.content_type;
  if (type.startsWith("image/")) {
    const image = el("img", { src, alt });
    await image.decode();
    image.classList.toggle("small-image", image.naturalWidth < 200);
    return image;
  }
  if (type.startsWith("video/")) {
    const video = el("video", { src, "aria-label": alt, loop: true, controls: large, playsinline: true, preload: "metadata" });
    video.muted = true;
    if (large && !matchMedia("(prefers-reduced-motion: reduce)").matches) video.autoplay = true;
    return video;
  }
  if (type.startsWith("audio/")) return el(large ? "audio" : "p", { src: large && src, controls: large, class: "file", "aria-label": alt }, large ? "" : "Sound");
  return el("p", { class: "file" }, artifact.name.split(".").pop());
}

/** Say why a request failed, in one line. */
export function reasonOf(unit) {
  return unit.causes.at(-1) ?? unit.history.at(-1)?.reason ?? "";
}

class Tile {
  constructor(entry, unit, gallery) {
    this.entry = entry;
    this.index = unit.index;
    this.gallery = gallery;
    this.panels = makePanels();
    this.words = el("p", { class: "words" });
    this.media = el("div", { class: "media" });
    this.frame = el(
      "button",
      { type: "button", class: "frame", onclick: () => gallery.onopen(this) },
      this.media,
      (this.doing = el("div", { class: "doing" }, this.panels.node, this.words)),
    );
    this.facts = el("p", { class: "facts" });
    this.caption = el("p", { class: "prompt" });
    this.node = el("li", { class: "tile", "data-request": entry.id }, this.frame, this.caption, this.facts);
    this.node.tile = this;
    this.update();
  }

  get request() {
    return this.entry.request;
  }

  get unit() {
    return this.request.units.find(({ index }) => index === this.index);
  }

  get title() {
    return this.request.inputs.prompt || this.request.model;
  }

  update() {
    const { request, unit } = this;
    const progress = progressOf(unit);
    this.setRatio(request.inputs.width / request.inputs.height || this.gallery.ratioOf(request.model));
    this.caption.textContent = this.title;
    this.facts.textContent = factsOf(request, unit);
    this.frame.setAttribute("aria-label", `${this.title}: ${progress.text}`);
    this.node.dataset.state = unit.state;
    this.doing.hidden = unit.state === DONE;
    this.panels.show(progress);
    this.panels.node.hidden = request.terminal && unit.state !== DONE;
    this.words.textContent = progress.text;
    this.show(unit.artifact ?? unit.preview ?? unit.previews.at(-1)?.artifact);
  }

  setRatio(ratio) {
    const bounded = Math.min(2.4, Math.max(0.5, ratio));
    if (this.ratio !== bounded) this.node.style.setProperty("--ratio", (this.ratio = bounded));
  }

  async show(artifact) {
    if (!artifact || this.shown === artifact.name) return;
    this.shown = artifact.name;
    try {
      const media = await makeMedia(artifact, "");
      if (this.shown === artifact.name) this.media.replaceChildren(media);
    } catch (error) {
      if (this.shown !== artifact.name) return; // a preview that the image has overtaken
      this.shown = "";
      if (this.unit.state !== DONE) return;
      this.doing.hidden = false;
      this.panels.node.hidden = true;
      this.words.textContent = await mediaProblem(artifact.name, error);
    }
  }
}

function factsOf(request, unit) {
  const { width, height, num_frames: frames, num_inference_steps: steps } = request.inputs;
  const took = request.terminal && unit.state === DONE ? duration(request.finished_at - request.created_at) : "";
  return [width && height && `${width} × ${height}`, frames && `${frames} frames`, steps && `${steps} steps`, `seed ${unit.seed}`, took]
    .filter(Boolean)
    .join(" · ");
}

/** Whether a request is before another one in the list of the server. */
function isNewer(one, other) {
  return one.created_at > other.created_at || (one.created_at === other.created_at && one.id > other.id);
}

/** The list of tiles. */
export class Gallery {
  constructor({ onopen, onchange }) {
    this.onopen = onopen;
    this.onchange = onchange;
    this.list = document.getElementById("gallery");
    this.empty = document.getElementById("empty");
    this.older = document.getElementById("older");
    this.problem = document.getElementById("gallery-problem");
    this.entries = new Map();
    this.cards = new Map();
    this.waiting = [];
    this.streams = 0;
    this.drops = 0;
    this.older.addEventListener("click", () => this.load());
    document.addEventListener("visibilitychange", () => this.refresh());
    setInterval(() => this.refresh(), REFRESH_MS);
  }

  /** Take the models, whose defaults say how large an image will be. */
  setModels(cards) {
    this.cards = new Map(cards.map((card) => [card.id, card]));
  }

  ratioOf(model) {
    const parameters = this.cards.get(model)?.parameters ?? [];
    const side = (wanted) => parameters.find(({ name }) => name === wanted)?.default;
    return side("width") / side("height") || 1;
  }

  /** Get the next page of requests, those that are older than all here. */
  async load() {
    try {
      const page = await this.nextPage();
      for (const request of page.data) this.add(request);
      this.older.hidden = !page.has_more;
      this.loaded = true;
      this.problem.textContent = "";
      this.showEmpty();
    } catch (error) {
      this.problem.textContent = error.message;
    }
  }

  async nextPage() {
    for (;;) {
      const { oldest } = this;
      try {
        return await getJson(`v1/requests?limit=${PAGE}${oldest ? `&after=${encodeURIComponent(oldest.id)}` : ""}`);
      } catch (error) {
        if (error.status !== 404 || !oldest) throw error;
        this.drop(oldest); // somebody else has deleted it: the list goes on after the one before
      }
    }
  }

  /** Look for requests that others have made meanwhile. */
  async refresh() {
    if (!this.loaded || document.hidden || this.refreshing) return;
    this.refreshing = true;
    const { drops } = this;
    try {
      const { data } = await getJson(`v1/requests?limit=${PAGE}`);
      if (drops !== this.drops) return; // one of them may be deleted by now: the next turn asks again
      for (const request of data) {
        if (this.older.hidden || !this.oldest || isNewer(request, this.oldest.request)) this.add(request);
      }
    } catch {
      // The status line says that the server does not answer; the next turn asks again.
    } finally {
      this.refreshing = false;
    }
  }

  get oldest() {
    return this.list.lastElementChild?.tile.entry;
  }

  /** Show a request among the others, by its age. */
  add(request) {
    const known = this.entries.get(request.id);
    if (known) return known;
    const entry = { id: request.id, request, abort: new AbortController() };
    const units = request.units.toSorted((one, other) => one.index - other.index);
    entry.tiles = units.map((unit) => new Tile(entry, unit, this));
    this.entries.set(request.id, entry);
    const next = [...this.list.children].find(({ tile }) => isNewer(request, tile.request)) ?? null;
    for (const { node } of entry.tiles) this.list.insertBefore(node, next);
    this.showEmpty();
    if (!request.terminal) {
      this.waiting.push(entry);
      this.followNext();
    }
    return entry;
  }

  followNext() {
    if (this.streams >= STREAMS || !this.waiting.length) return;
    const entry = this.waiting.shift();
    this.streams += 1;
    follow(`v1/requests/${entry.id}/events`, (name, data) => this.take(entry, name, data), entry.abort.signal)
      .catch((error) => (error.status === 404 ? this.drop(entry) : console.warn(error)))
      .finally(() => {
        this.streams -= 1;
        this.followNext();
      });
  }

  take(entry, name, data) {
    if (name === "ended") {
      entry.request = data;
      const made = data.units.filter(({ state }) => state === DONE).length;
      announce(made ? `Done: ${entry.tiles[0].title}` : `${ENDS[data.state] ?? "Ended"}: ${entry.tiles[0].title}`);
    } else {
      const unit = entry.request.units.find(({ index }) => index === data.index);
      if (name === "state") unit.state = data.state;
      else if (name === "step") Object.assign(unit, { step: data.step, total_steps: data.total_steps });
      else if (name === "partial_image") {
        unit.preview = { name: decodeURIComponent(data.url.split("/").pop()), content_type: "image/png" };
      }
    }
    for (const tile of entry.tiles) if (name === "ended" || tile.index === data.index) tile.update();
    this.onchange?.(entry);
  }

  /** Ask the server to stop a request. */
  async cancel(request) {
    await call(`v1/requests/${request.id}`, { method: "DELETE" });
  }

  /** Delete a request, its images and its prompt. */
  async remove(request) {
    await call(`v1/requests/${request.id}`, { method: "DELETE" });
    const entry = this.entries.get(request.id);
    if (entry) this.drop(entry);
    await forgetFiles(request.id);
    announce("Deleted.");
  }

  drop(entry) {
    this.drops += 1;
    entry.abort.abort();
    this.entries.delete(entry.id);
    this.waiting = this.waiting.filter((other) => other !== entry);
    for (const tile of entry.tiles) tile.node.remove();
    for (const { artifact } of entry.request.units) if (artifact) forgetMedia(artifact.name);
    this.showEmpty();
  }

  showEmpty() {
    this.empty.hidden = this.entries.size > 0;
  }
}

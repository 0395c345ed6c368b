// The prompt box: what the chosen model takes, and the requests that are made of it.

import { call } from "./api.js";
import { MAX_IMAGES, MAX_PARTIAL_IMAGES, MAX_PRIORITY, OUTPUT_FORMATS } from "./constants.js";
import { announce, button, el, labelOf } from "./dom.js";
import { MAIN, limitsOf, makeField, takesImages } from "./fields.js";
import { filesOf, keepFiles } from "./kept.js";
import { paintMask } from "./mask.js";
import { Slot, takeDrops } from "./slots.js";

const MASK = "mask_image";
const MISSING = "The images of that request are not in this browser: add them again.";
const OWN = [
  { name: "seed", kind: "integer", minimum: 0, default: "random" },
  { name: "n", kind: "integer", minimum: 1, maximum: MAX_IMAGES, default: 1 },
];
const SCHEDULING = [
  { name: "priority", kind: "integer", minimum: -MAX_PRIORITY, maximum: MAX_PRIORITY, default: 0, description: "A higher one goes first." },
  { name: "deadline_s", kind: "number", minimum: 0, description: "Seconds from now in which the result is wanted." },
];

/** The prompt box; calls `onrequest` with each request that the server has accepted. */
export class Composer {
  constructor({ onrequest }) {
    this.onrequest = onrequest;
    this.models = [];
    this.model = null;
    this.fields = [];
    this.slots = [];
    for (const id of ["composer", "prompt", "cells", "more", "more-button", "model", "generate", "problem"]) {
      this[id.replace(/-(\w)/, (_, letter) => letter.toUpperCase())] = document.getElementById(id);
    }
    this.composer.addEventListener("submit", (event) => (event.preventDefault(), this.submit()));
    this.composer.addEventListener("invalid", (event) => this.reveal(event.target), true);
    this.composer.addEventListener("input", () => this.clearProblem());
    this.moreButton.addEventListener("click", () => this.showMore(this.more.hidden));
    this.model.addEventListener("change", () => this.choose(this.model.value));
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
      event.preventDefault();
      if (!event.repeat) this.composer.requestSubmit();
    });
    takeDrops(() => this.slots);
  }

  /** Offer these models, as GET /v1/models has them. */
  setModels(cards) {
    this.cards = new Map(cards.map((card) => [card.id, card]));
    const chosen = this.card?.id ?? cards[0]?.id;
    this.model.replaceChildren(...cards.map((card) => el("option", { value: card.id }, nameOf(card))));
    this.choose(this.cards.has(chosen) ? chosen : cards[0].id);
  }

  /** Show what a model takes; values of parameters that the one before has as well stay. */
  choose(id) {
    const card = this.cards.get(id);
    if (!card) return;
    const before = new Map(this.fields.map((field) => [field.name, field.input.value]));
    const files = new Map(this.slots.map((slot) => [slot.name, slot.files]));
    this.card = card;
    this.model.value = id;
    const parameters = [...card.parameters.filter(({ alias_of: alias }) => !alias), ...OWN, formatOf(card)];
    this.makeFields(parameters.filter((parameter) => !takesImages(parameter)));
    this.makeSlots(parameters.filter(takesImages), files);
    for (const field of this.fields) {
      const value = before.get(field.name);
      if (value && field.input.type !== "file") field.input.value = value;
    }
    const takesPrompt = !card.parameters.length || card.parameters.some(({ name }) => name === "prompt");
    this.prompt.disabled = !takesPrompt;
    const medium = { video: "a video", audio: "a sound" }[card.medium] ?? "an image";
    this.prompt.placeholder = takesPrompt ? `Describe ${medium}` : "This model takes no prompt";
    this.composer.dataset.state = "ready";
  }

  makeFields(parameters) {
    const rest = parameters.filter(({ name }) => !["prompt", "width", "height", "output_type"].includes(name));
    const main = MAIN.map((name) => rest.find((parameter) => parameter.name === name)).filter(Boolean);
    const cells = main.map((parameter) => makeField(parameter, { compact: true }));
    const others = rest.filter((parameter) => !main.includes(parameter)).map((parameter) => makeField(parameter));
    const scheduling = SCHEDULING.map((parameter) => makeField(parameter));
    const size = sizeFields(parameters);
    this.fields = [...size.fields, ...cells, ...others, ...scheduling];
    this.cells.replaceChildren(...[size.node, ...cells.map(({ node }) => node)].filter(Boolean));
    const open = this.more.querySelector("details")?.open;
    const fold = el("details", { open }, el("summary", {}, "Advanced"), el("div", { class: "fields" }, scheduling.map(({ node }) => node)));
    this.more.replaceChildren(...others.map(({ node }) => node), fold);
  }

  makeSlots(parameters, files) {
    const tasks = this.card.tasks ?? [];
    const order = ["image", MASK, "last_image"];
    const rank = ({ name }) => (order.includes(name) ? order.indexOf(name) : order.length);
    this.slots = [...parameters].sort((one, other) => rank(one) - rank(other)).map((parameter) => {
      const needed =
        parameter.required || (tasks.length > 0 && tasks.every(({ requires }) => requires.includes(parameter.name)));
      return new Slot(parameter, { needed, onchange: () => (this.clearProblem(), this.offerMask()) });
    });
    this.slotsOf = new Map(this.slots.map((slot) => [slot.name, slot]));
    this.paint = button("Paint a mask", () => this.openPainter(), { class: "quiet", hidden: true });
    this.slotsOf.get(MASK)?.extra.append(this.paint);
    this.slotsElement.replaceChildren(...this.slots.map(({ node }) => node));
    for (const slot of this.slots) if (files.get(slot.name)?.length) slot.set(files.get(slot.name));
  }

  get slotsElement() {
    return document.getElementById("slots");
  }

  offerMask() {
    this.paint.hidden = !this.slotsOf.get("image")?.files.length;
  }

  async openPainter() {
    const mask = await paintMask(this.slotsOf.get("image").files[0], this.slotsOf.get(MASK).files[0]);
    if (mask) this.slotsOf.get(MASK).set([mask]);
    this.paint.focus();
  }

  showMore(shown) {
    this.more.hidden = !shown;
    this.moreButton.setAttribute("aria-expanded", String(shown));
  }

  /** Open what a field is folded away in. */
  reveal(input) {
    if (!this.more.contains(input)) return;
    this.showMore(true);
    const fold = input.closest("details");
    if (fold) fold.open = true;
  }

  /** Send what is in the box: one request at a time, since Enter gets here while the button is disabled, too. */
  async submit() {
    if (this.generate.disabled || !this.card) return;
    const form = new FormData();
    if (!this.prompt.disabled && this.prompt.value.trim()) form.set("prompt", this.prompt.value.trim());
    for (const field of this.fields) {
      const value = field.input.disabled ? "" : field.read();
      if (value !== "") form.set(field.name, value);
    }
    for (const slot of this.slots) for (const file of slot.files) form.append(slot.name, file, file.name);
    form.set("model", this.card.id);
    await this.send(form);
  }

  /** Make a request again with another seed; without the images that it was made of, say so and send nothing. */
  async vary(request) {
    const files = await this.filesFor(request);
    if (!files) return this.showProblem(MISSING);
    const form = new FormData();
    for (const [name, value] of Object.entries(request.inputs)) {
      if (value === null || areFiles(value)) continue;
      form.set(name, typeof value === "object" ? JSON.stringify(value) : String(value));
    }
    for (const [name, file] of files) form.append(name, file, file.name);
    form.set("model", request.model);
    if (request.output.format) form.set("output_format", request.output.format);
    for (const { name } of SCHEDULING) if (request[name]) form.set(name, String(request[name]));
    form.set("n", String(request.units.length));
    await this.send(form);
  }

  /** Fill the box with what an image was made of. */
  async useAgain(request, unit) {
    this.choose(request.model);
    this.prompt.value = request.inputs.prompt ?? "";
    const { inputs, output, priority, deadline_s } = request;
    const values = { ...inputs, seed: unit.seed, output_format: output.format, priority: priority || "", deadline_s };
    for (const field of this.fields) field.write(values[field.name]);
    const files = await this.filesFor(request);
    for (const slot of this.slots) slot.set((files ?? []).filter(([name]) => name === slot.name).map(([, file]) => file));
    if (!files) this.showProblem(MISSING);
    this.composer.scrollIntoView({ block: "start" });
    this.prompt.focus();
  }

  /** Take a file as the image to edit; returns whether the model takes one. */
  useImage(file) {
    const slot = this.slots[0];
    slot?.set([file]);
    return Boolean(slot);
  }

  /** Return names and files of the images that a request was made of; null where it has some that are not in this browser. */
  async filesFor(request) {
    if (!Object.values(request.inputs).some(areFiles)) return [];
    const files = await filesOf(request.id);
    return files.length ? files : null;
  }

  field(name) {
    return this.fields.find((field) => field.name === name);
  }

  async send(form) {
    form.set("partial_images", String(MAX_PARTIAL_IMAGES));
    this.clearProblem();
    this.generate.disabled = true;
    try {
      const answer = await call("v1/images/generations", {
        method: "POST",
        body: form,
        headers: { Prefer: "respond-async" },
      });
      const request = await answer.json();
      const files = [...form].filter(([, value]) => value instanceof File);
      if (files.length) await keepFiles(request.id, files);
      announce("Accepted.");
      this.onrequest(request);
    } catch (error) {
      this.showProblem(error.message, error.param);
    } finally {
      this.generate.disabled = false;
    }
  }

  showProblem(message, name = null) {
    this.problem.textContent = message;
    const input = name === "prompt" ? this.prompt : (this.field(name)?.input ?? this.slotsOf.get(name)?.input);
    if (!input) return this.problem.scrollIntoView({ block: "nearest" });
    this.reveal(input);
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }

  clearProblem() {
    if (!this.problem.textContent) return;
    this.problem.textContent = "";
    for (const input of this.composer.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  }
}

function nameOf({ id, state }) {
  return state === "loaded" ? id : `${id} (${state})`;
}

function formatOf({ medium }) {
  return { name: "output_format", kind: "text", choices: OUTPUT_FORMATS[medium] ?? OUTPUT_FORMATS.image, default: null };
}

/** Make one cell of width and height. */
function sizeFields(parameters) {
  const sides = ["width", "height"].map((name) => parameters.find((parameter) => parameter.name === name));
  const fields = sides.filter(Boolean).map((side) => makeField(side, { compact: true }));
  if (!fields.length) return { node: null, fields };
  for (const { name, input } of fields) input.setAttribute("aria-label", labelOf(name));
  const limits = limitsOf(sides.find(Boolean));
  const node = el(
    "div",
    { class: "cell size", role: "group", "aria-label": "Size" },
    el("div", { class: "caption" }, el("span", {}, "Size"), limits && el("span", { class: "limits" }, limits)),
    el("div", { class: "pair" }, fields[0].input, fields[1] && el("span", { "aria-hidden": "true" }, "×"), fields[1]?.input),
  );
  return { node, fields };
}

/** Whether an input of a request is files, of which the server tells names and sizes alone. */
function areFiles(value) {
  const one = Array.isArray(value) ? value[0] : value;
  return typeof one === "object" && one !== null && "bytes" in one && "name" in one;
}

// Images of a request, and videos as their frames: chosen, dropped or pasted, one slot for each input of the model that takes some.

import { announce, button, el, labelOf } from "./dom.js";

const IMAGES = ["image/png", "image/jpeg", "image/webp"];
const VIDEOS = ["video/mp4", "video/webm"];

/** A place for the images of one parameter. */
export class Slot {
  constructor(parameter, { needed = false, onchange }) {
    this.parameter = parameter;
    this.name = parameter.name;
    this.many = parameter.kind === "images";
    this.types = parameter.video ? [...IMAGES, ...VIDEOS] : IMAGES;
    this.files = [];
    this.onchange = onchange;
    this.input = el("input", {
      type: "file",
      class: "visually-hidden",
      accept: this.types.join(),
      multiple: this.many,
      onchange: () => (this.add([...this.input.files]), (this.input.value = "")),
    });
    this.thumbs = el("div", { class: "thumbs" });
    this.extra = el("div", { class: "extra" });
    this.label = labelOf(this.name);
    this.words = el("span", {}, `+ ${this.label}${needed ? " (needed)" : ""}`);
    this.wanted = this.words.textContent;
    this.node = el(
      "div",
      { class: "slot", "data-slot": this.name },
      this.thumbs,
      el("label", { class: "choose" }, this.input, this.words),
      this.extra,
    );
    this.node.slot_ = this;
  }

  /** Take images; a slot of one image keeps the last. */
  add(files) {
    const taken = files.filter(({ type }) => this.types.includes(type));
    if (taken.length < files.length) announce("Images are PNG, JPEG or WebP.");
    const video = taken.find(({ type }) => VIDEOS.includes(type));
    if (video) this.set([video]);
    else if (taken.length) this.set(this.many ? [...this.files, ...taken] : taken.slice(-1));
  }

  /** Replace the images. */
  set(files) {
    for (const image of this.thumbs.querySelectorAll("img, video")) URL.revokeObjectURL(image.src);
    this.files = files;
    this.thumbs.replaceChildren(
      ...files.map((file) =>
        el(
          "div",
          { class: "thumb" },
          VIDEOS.includes(file.type)
            ? el("video", { src: URL.createObjectURL(file), "aria-label": file.name })
            : el("img", { src: URL.createObjectURL(file), alt: file.name }),
          button("×", () => this.set(this.files.filter((other) => other !== file)), {
            "aria-label": `Remove ${this.label.toLowerCase()} ${file.name}`,
          }),
        ),
      ),
    );
    this.node.classList.toggle("filled", files.length > 0);
    const another = `${this.many ? "+ Another" : "Another"} ${this.label.toLowerCase()}`;
    this.words.textContent = files.length ? another : this.wanted;
    this.onchange?.(this);
  }
}

/** Let the whole page take dropped and pasted images: those over a slot go there, others to the first. */
export function takeDrops(slots) {
  const files = (event) => [...(event.dataTransfer ?? event.clipboardData).files];
  let depth = 0;
  const over = (by) => document.body.classList.toggle("dropping", (depth = Math.max(0, depth + by)) > 0);
  addEventListener("dragenter", (event) => event.dataTransfer.types.includes("Files") && over(1));
  addEventListener("dragleave", (event) => event.dataTransfer.types.includes("Files") && over(-1));
  addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    over(-depth);
    const slot = event.target.closest?.(".slot")?.slot_ ?? slots()[0];
    if (slot) slot.add(files(event));
    else announce("This model takes no images.");
  });
  addEventListener("paste", (event) => {
    if (!files(event).length || !slots().length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    slots()[0].add(files(event));
  });
}

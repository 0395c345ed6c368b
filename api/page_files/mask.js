// Paint a mask on an image: with a pointer, or as rectangles in numbers.

import { button, el } from "./dom.js";

const UNDOS = 20;

/**
 * Let somebody paint the part of an image that is to be made anew.
 * Returns a PNG as large as the image, white where it was painted, or null if they changed their mind.
 */
export async function paintMask(imageFile, maskFile = null) {
  const image = await load(imageFile);
  const painter = new Painter(image);
  if (maskFile) painter.take(await load(maskFile));
  return painter.result;
}

async function load(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  await image.decode();
  return image;
}

/** Make stripes that are seen on images of any colour. */
function stripes(side) {
  const tile = el("canvas", { width: side, height: side });
  const context = tile.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, side, side);
  context.strokeStyle = "#111";
  context.lineWidth = side / 3;
  for (const shift of [-side, 0, side]) {
    context.beginPath();
    context.moveTo(shift - side, 2 * side);
    context.lineTo(shift + 2 * side, -side);
    context.stroke();
  }
  return tile;
}

class Painter {
  constructor(image) {
    this.image = image;
    this.canvas = el("canvas", { width: image.naturalWidth, height: image.naturalHeight, "aria-label": "Mask" });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.paint = this.context.createPattern(stripes(Math.max(4, Math.round(this.canvas.width / 40))), "repeat");
    this.undos = [];
    image.alt = "The image to paint on";
    image.classList.toggle("small-image", image.naturalWidth < 200);
    this.board = el("div", { class: "board" }, image, this.canvas);
    this.board.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
    this.listen();
    this.result = new Promise((resolve) => this.open(resolve));
  }

  open(resolve) {
    const side = Math.min(this.canvas.width, this.canvas.height);
    this.size = el("input", { type: "range", min: 1, max: Math.ceil(side / 2), value: Math.ceil(side / 8), id: "brush" });
    this.eraser = el("input", { type: "checkbox", id: "eraser" });
    const tools = el(
      "div",
      { class: "tools" },
      el("div", { class: "tool" }, el("label", { for: "brush" }, "Brush"), this.size),
      el("label", { class: "tool" }, this.eraser, "Erase"),
      button("Undo", () => this.undo(), { class: "quiet" }),
      button("Invert", () => (this.remember(), this.invert()), { class: "quiet" }),
      button("Clear", () => (this.remember(), this.clear()), { class: "quiet" }),
      this.rectangle(),
    );
    let kept = false;
    this.dialog = el(
      "dialog",
      { class: "painter", "aria-labelledby": "painter-title" },
      el("h2", { id: "painter-title" }, "Paint what is made anew"),
      this.board,
      tools,
      el(
        "div",
        { class: "actions" },
        button("Cancel", () => this.dialog.close(), { class: "quiet" }),
        button("Use mask", () => ((kept = true), this.dialog.close()), { class: "primary" }),
      ),
    );
    this.dialog.addEventListener("close", async () => {
      this.dialog.remove();
      resolve(kept ? await this.file() : null);
    });
    document.body.append(this.dialog);
    this.dialog.showModal();
  }

  /** For those without a pointer: a rectangle by its edges, in pixels. */
  rectangle() {
    const { width, height } = this.canvas;
    const number = (name, value, max) =>
      el("label", {}, name, el("input", { type: "number", min: 0, max, value, "data-side": name.toLowerCase() }));
    const fields = [number("Left", 0, width), number("Top", 0, height), number("Width", Math.round(width / 2), width), number("Height", Math.round(height / 2), height)];
    const add = button("Fill rectangle", () => {
      const [left, top, wide, high] = fields.map((field) => Number(field.querySelector("input").value));
      this.remember();
      this.pen();
      this.context.fillRect(left, top, wide, high);
    }, { class: "quiet" });
    return el("details", {}, el("summary", {}, "By numbers"), el("div", { class: "numbers" }, fields, add));
  }

  listen() {
    let last = null;
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const scale = this.canvas.width / box.width;
      return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.remember();
      this.line((last = at(event)), last);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      for (const move of event.getCoalescedEvents?.() ?? [event]) {
        const next = at(move);
        this.line(last, next);
        last = next;
      }
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (last = null));
  }

  pen() {
    this.context.globalCompositeOperation = this.eraser.checked ? "destination-out" : "source-over";
    this.context.fillStyle = this.context.strokeStyle = this.paint;
  }

  line([fromX, fromY], [toX, toY]) {
    this.pen();
    Object.assign(this.context, { lineWidth: 2 * this.size.value, lineCap: "round", lineJoin: "round" });
    this.context.beginPath();
    this.context.moveTo(fromX, fromY);
    this.context.lineTo(toX, toY);
    this.context.stroke();
  }

  remember() {
    this.undos.push(this.context.getImageData(0, 0, this.canvas.width, this.canvas.height));
    this.undos.splice(0, this.undos.length - UNDOS);
  }

  undo() {
    const before = this.undos.pop();
    if (before) this.context.putImageData(before, 0, 0);
  }

  clear() {
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  invert() {
    this.context.globalCompositeOperation = "xor";
    this.context.fillStyle = this.paint;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /** Go on with a mask that was painted before: what is white in it. */
  take(mask) {
    const { width, height } = this.canvas;
    this.context.drawImage(mask, 0, 0, width, height);
    const pixels = this.context.getImageData(0, 0, width, height);
    for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at] > 127 ? 255 : 0;
    this.context.putImageData(pixels, 0, 0);
    this.context.globalCompositeOperation = "source-in";
    this.context.fillStyle = this.paint;
    this.context.fillRect(0, 0, width, height);
  }

  file() {
    const { width, height } = this.canvas;
    const made = el("canvas", { width, height });
    const context = made.getContext("2d");
    context.drawImage(this.canvas, 0, 0);
    for (const [operation, color] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
      context.globalCompositeOperation = operation;
      context.fillStyle = color;
      context.fillRect(0, 0, width, height);
    }
    return new Promise((resolve) => made.toBlob((blob) => resolve(new File([blob], "mask.png", { type: "image/png" })), "image/png"));
  }
}

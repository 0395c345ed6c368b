// Elements and words. Text is only ever a text node: nothing that a user or a server says becomes markup.

/** Make an element. Attributes whose names begin with "on" are listeners; null, undefined and false leave one out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Make a button that does something. */
export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

/** Change a text only where it is another one, so that nothing is announced or selected anew. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** The outline of a cross: of what has fallen, or was lost. */
export const CROSS = "M3.2 1.4 8 6.2l4.8-4.8 1.8 1.8L9.8 8l4.8 4.8-1.8 1.8L8 9.8l-4.8 4.8-1.8-1.8L6.2 8 1.4 3.2z";

/** Make an icon from its outline, in a square of 16. */
export function makeIcon(outline) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  for (const [name, value] of Object.entries({ viewBox: "0 0 16 16", class: "map-icon", "aria-hidden": "true" })) {
    svg.setAttribute(name, value);
  }
  path.setAttribute("d", outline);
  path.setAttribute("fill-rule", "evenodd");
  svg.append(path);
  return svg;
}

const LABELS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  true_cfg_scale: "True guidance",
  num_frames: "Frames",
  fps: "Frames a second",
  frame_rate: "Frames a second",
  mask_image: "Mask",
  lora: "LoRA",
  lora_scale: "LoRA scale",
  output_format: "File format",
  n: "Images",
  deadline_s: "Deadline",
};

/** Return how people read the name of a parameter. */
export function labelOf(name) {
  const text = LABELS[name] ?? name.replaceAll("_", " ").replace(/\bvae\b/i, "VAE");
  return text[0].toUpperCase() + text.slice(1);
}

/** Say a duration. */
export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 100) return `${seconds.toFixed(1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** Say a moment, given in unix seconds. */
export function moment(seconds) {
  return new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" }).format(seconds * 1000);
}

/** Tell who listens instead of looking. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Wait; ends early when the signal aborts. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

// A field for each parameter of a model, with its limits, as GET /v1/models describes it.

import { el, labelOf } from "./dom.js";

/** Names of the parameters that are always in sight, in order; the others are under "More parameters". */
export const MAIN = ["num_frames", "num_inference_steps", "guidance_scale", "seed", "n"];
const IMAGES = new Set(["image", "images"]);
const MOST_OPTIONS = 16;
const LONG = /prompt|lyrics|instruction/;

/** Whether a parameter is one image, or several. */
export function takesImages(parameter) {
  return IMAGES.has(parameter.kind);
}

/** Say the limits of a number, "" where there are none. */
export function limitsOf({ minimum, maximum, multiple_of: every, one_more_than_multiple_of: after }) {
  if (minimum !== undefined && minimum === maximum) return "";
  const range =
    minimum < 0 && maximum !== undefined ? `${minimum} to ${maximum}`
    : minimum !== undefined && maximum !== undefined ? `${minimum}–${maximum}`
    : minimum ? `from ${minimum}`
    : maximum !== undefined ? `to ${maximum}`
    : "";
  const step = every > 1 ? `by ${every}` : after ? `1 + ${after}k` : "";
  return [range, step].filter(Boolean).join(" ");
}

/**
 * Make the field of a parameter: its element, and how to read and write it.
 * `read` returns the text or file to send, "" for the model's default.
 */
export function makeField(parameter, { compact = false } = {}) {
  const id = `parameter-${parameter.name}`;
  const input = inputOf(parameter, id);
  const limits = limitsOf(parameter);
  const hint = [parameter.description, compact ? "" : limits, optionNames(parameter)].filter(Boolean).join(" ");
  const hintId = hint && !compact ? `${id}-hint` : null;
  if (hintId) input.setAttribute("aria-describedby", hintId);
  const label = el("label", { for: id }, labelOf(parameter.name));
  const node = el(
    "div",
    { class: compact ? "cell" : "field", "data-parameter": parameter.name },
    el("div", { class: "caption" }, label, compact && limits && el("span", { class: "limits" }, limits)),
    input,
    hintId && el("p", { class: "hint", id: hintId }, hint),
  );
  return {
    name: parameter.name,
    node,
    input,
    read: () => (input.type === "file" ? (input.files[0] ?? "") : asText(parameter, input.value.trim())),
    write: (value) => {
      if (input.type !== "file") input.value = shown(parameter, value);
    },
  };
}

function inputOf(parameter, id) {
  const { kind, choices } = parameter;
  const fallback = placeholderOf(parameter);
  const common = { id, name: parameter.name, autocomplete: "off" };
  if (kind === "integer" || kind === "number") {
    const every = parameter.one_more_than_multiple_of ?? parameter.multiple_of;
    const fixed = parameter.minimum !== undefined && parameter.minimum === parameter.maximum;
    return el("input", {
      ...common,
      type: parameter.many ? "text" : "number",
      inputmode: kind === "integer" ? "numeric" : "decimal",
      min: parameter.one_more_than_multiple_of ? 1 : parameter.minimum,
      max: parameter.maximum,
      step: every ?? (kind === "integer" ? 1 : "any"),
      placeholder: fallback,
      disabled: fixed,
    });
  }
  if (kind === "boolean") return select(common, [["", `Default${fallback && `: ${fallback}`}`], ["true", "Yes"], ["false", "No"]]);
  if (choices && kind !== "tensors") {
    return select(common, [["", fallback ? `Default: ${fallback}` : "Default"], ...choices.map((name) => [name, name])]);
  }
  if (kind === "tensors") return el("input", { ...common, type: "file", accept: ".safetensors" });
  if (["json", "options", "texts"].includes(kind) || LONG.test(parameter.name)) {
    return el("textarea", { ...common, rows: 2, placeholder: fallback || (kind === "options" ? '{"option": value}' : "") });
  }
  return el("input", { ...common, type: "text", placeholder: fallback || (kind === "numbers" ? "1.0, 0.5" : "") });
}

function select(attributes, options) {
  return el("select", attributes, options.map(([value, text]) => el("option", { value }, text)));
}

function placeholderOf({ default: value, kind }) {
  if (value === null || value === undefined) return "";
  if (kind === "boolean") return value ? "yes" : "no";
  return Array.isArray(value) ? value.join(", ") : String(value);
}

function optionNames({ options }) {
  const names = new Set(Object.values(options ?? {}).flatMap((each) => Object.keys(each)));
  return names.size && names.size <= MOST_OPTIONS ? `Options: ${[...names].sort().join(", ")}.` : "";
}

/** Return what a form sends; a text with several lines is a list where the parameter takes one. */
function asText({ kind }, text) {
  if (kind !== "texts" || text.startsWith("[")) return text;
  const lines = text.split("\n").filter(Boolean);
  return lines.length > 1 ? JSON.stringify(lines) : text;
}

/** Return a value of a request as its field shows it. */
function shown({ kind }, value) {
  if (value === null || value === undefined) return "";
  if (kind === "texts" && Array.isArray(value)) return value.join("\n");
  if (Array.isArray(value) && kind !== "json") return value.join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

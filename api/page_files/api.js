// Calls of the HTTP API, with the key of this tab where the server has keys. Paths are relative to the page, so that it
// works behind a proxy, too.

import { button, el, pause } from "./dom.js";

const KEY = "triptych-api-key";
let asking = null;
let declined = false;

/** An answer with an error status, in the server's words. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = "" }) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

/** Return the key of this tab, "" for none. */
export function currentKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

/** Send a request; returns the answer if it is no error. Where a key is needed, ask for it and send again. */
export async function call(path, options = {}) {
  for (;;) {
    const key = currentKey();
    const headers = new Headers(options.headers);
    if (key) headers.set("Authorization", `Bearer ${key}`);
    let answer;
    try {
      answer = await fetch(new URL(path, document.baseURI), { ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ApiError(0, { message: "The server does not answer." });
    }
    if (answer.ok) return answer;
    if (answer.status === 401 && (key !== currentKey() || (await askForKey(key)))) continue;
    throw await errorOf(answer);
  }
}

/** GET a JSON document. */
export async function getJson(path, options) {
  return (await call(path, options)).json();
}

async function errorOf(answer) {
  const body = await answer.json().catch(() => null);
  return new ApiError(answer.status, body?.error ?? { message: `The server answered ${answer.status}.` });
}

/** Ask for the key, once for all calls that wait for it; returns whether there is another one now. */
export function askForKey(refused = "", again = false) {
  if (declined && !again) return Promise.resolve(false);
  asking ??= showKeyDialog(refused).finally(() => (asking = null));
  return asking;
}

function showKeyDialog(refused) {
  return new Promise((resolve) => {
    const input = el("input", { id: "key", type: "password", autocomplete: "off", required: true, spellcheck: "false" });
    const finish = (given) => {
      declined = !given;
      dialog.remove();
      document.getElementById("key-button").hidden = false;
      resolve(given);
    };
    const form = el(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          sessionStorage.setItem(KEY, input.value.trim());
          dialog.close("given");
        },
      },
      el("h2", { id: "key-title" }, "API key"),
      el("p", {}, refused ? "The server does not know this key." : "This server asks for a key."),
      el("label", { for: "key" }, "Key"),
      input,
      el("p", { class: "hint" }, "It is kept in this tab until you close it."),
      el(
        "div",
        { class: "actions" },
        button("Not now", () => dialog.close(), { class: "quiet" }),
        el("button", { class: "primary" }, "Use key"),
      ),
    );
    const dialog = el("dialog", { class: "small", "aria-labelledby": "key-title" }, form);
    dialog.addEventListener("close", () => finish(dialog.returnValue === "given"));
    document.body.append(dialog);
    dialog.showModal();
  });
}

/**
 * Follow server-sent events of `path` until the event `ended`, over lost connections; returns when there are no more.
 * Throws what the server refuses, and what `onEvent` throws.
 */
export async function follow(path, onEvent, signal) {
  let lastId = "";
  while (!signal.aborted) {
    try {
      const answer = await call(path, { signal, headers: lastId ? { "Last-Event-ID": lastId } : {} });
      if (answer.status === 204) return;
      for await (const { id, event, data } of eventsOf(answer.body)) {
        lastId = id || lastId;
        onEvent(event, JSON.parse(data));
        if (event === "ended") return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (!isPassing(error)) throw error;
    }
    await pause(1000, signal);
  }
}

/** Whether it may go well the next time: no connection, too many requests, or a server that is not up. */
function isPassing(error) {
  return error instanceof ApiError && (error.status < 400 || error.status === 429 || error.status >= 500);
}

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(() => {
        throw new ApiError(0, { message: "The connection was lost." });
      });
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const fields = {};
        for (const line of block.split("\n")) {
          const colon = line.indexOf(":");
          fields[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
        }
        if (fields.data) yield fields;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it rejects where the connection was lost: there is nothing left to end
  }
}

const blobs = new Map();

/** Return the path of a file of a request. */
export function mediaPath(name) {
  return `v1/images/${encodeURIComponent(name)}`;
}

/** Return a URL by which elements can show a file of a request; with a key the file is fetched with it. */
export async function mediaUrl(name) {
  const path = mediaPath(name);
  if (!currentKey()) return new URL(path, document.baseURI).href;
  if (!blobs.has(name)) {
    blobs.set(name, call(path).then((answer) => answer.blob()).then((blob) => URL.createObjectURL(blob)));
    blobs.get(name).catch(() => blobs.delete(name));
  }
  return blobs.get(name);
}

/** Say why the file of a request cannot be shown. An element that cannot load it does not know: the server is asked. */
export async function mediaProblem(name, error) {
  const ask = () => call(mediaPath(name), { headers: { Range: "bytes=0-0" } });
  const reason = error instanceof ApiError ? error : await ask().then(() => error, (refusal) => refusal);
  return [404, 410].includes(reason.status) ? "This file is not kept any more" : reason.message;
}

/** Give the memory of a file back. */
export function forgetMedia(name) {
  blobs.get(name)?.then((url) => URL.revokeObjectURL(url), () => {});
  blobs.delete(name);
}

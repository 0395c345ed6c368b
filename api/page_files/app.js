// The page: its sections, what they share, and what is asked of the server again and again.

import { askForKey, currentKey, getJson } from "./api.js";
import { mountCluster } from "./cluster.js";
import { Composer } from "./composer.js";
import { pause } from "./dom.js";
import { Gallery } from "./gallery.js";
import { Viewer } from "./viewer.js";

const STATUS_MS = 5000;
const MODELS_MS = 2000;

let gallery;
let viewer;
const composer = new Composer({ onrequest: (request) => gallery.add(request).tiles[0].node.scrollIntoView({ block: "nearest" }) });
gallery = new Gallery({ onopen: (tile) => viewer.open(tile), onchange: (entry) => viewer.changed(entry) });
viewer = new Viewer({ composer, gallery });

let stopCluster = null;
function showSection() {
  const chosen = location.hash === "#/system" ? "system" : "create";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.section === chosen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== chosen;
  if (chosen === "system") stopCluster ??= mountCluster(document.getElementById("cluster"));
  else {
    stopCluster?.();
    stopCluster = null;
  }
}
addEventListener("hashchange", showSection);
showSection();

const keyButton = document.getElementById("key-button");
keyButton.hidden = !currentKey();
keyButton.addEventListener("click", async () => (await askForKey("", true)) && location.reload());

const status = document.querySelector("#status [role=status]");
async function watchStatus() {
  for (;;) {
    const { text, level, title } = await statusNow();
    if (status.textContent !== text) status.textContent = text;
    status.parentElement.dataset.level = level;
    status.parentElement.title = title;
    await pause(STATUS_MS);
  }
}

async function statusNow() {
  try {
    const { status: word, reasons } = await (await fetch(new URL("ready", document.baseURI))).json();
    return word === "ready"
      ? { text: "Ready", level: "good", title: reasons.join("\n") }
      : { text: "Not ready", level: "warn", title: reasons.join("\n") };
  } catch {
    return { text: "No connection", level: "bad", title: "The server does not answer." };
  }
}

/** Get the models until all of them say what they take, and the gallery until it is there. */
async function watchModels() {
  for (let shown = ""; ; await pause(MODELS_MS)) {
    const { data } = await getJson("v1/models").catch((error) => (console.warn(error), { data: [] }));
    if (!data.length) continue;
    gallery.setModels(data);
    if (shown !== JSON.stringify(data)) composer.setModels(data);
    shown = JSON.stringify(data);
    if (!gallery.loaded) await gallery.load();
    if (gallery.loaded && data.every(({ parameters }) => parameters.length)) return;
  }
}

watchStatus();
watchModels();

// One image and all that is known of it, with what can be done with it.

import { call, mediaPath, mediaProblem, mediaUrl } from "./api.js";
import { announce, button, duration, el, labelOf, moment } from "./dom.js";
import { makeMedia, makePanels, progressOf, reasonOf } from "./gallery.js";
import { mountTimeline } from "./timeline.js";

const NOT_PARAMETERS = new Set(["prompt", "width", "height"]);
const LEFT = "left";

/** The dialog in which an image is looked at. */
export class Viewer {
  constructor({ composer, gallery }) {
    Object.assign(this, { composer, gallery });
    this.stage = el("div", { class: "stage" });
    this.details = el("div", { class: "details" });
    this.dialog = el(
      "dialog",
      { class: "viewer", "aria-label": "Image" },
      this.stage,
      this.details,
      button("×", () => this.dialog.close(), { class: "close", "aria-label": "Close" }),
    );
    this.dialog.addEventListener("close", () => this.closed());
    this.dialog.addEventListener("keydown", (event) => this.turn(event));
    this.dialog.addEventListener("click", (event) => event.target === this.stage && this.dialog.close());
    document.body.append(this.dialog);
  }

  /** Show the image of a tile of the gallery. */
  open(tile) {
    this.tile = tile;
    this.dialog.returnValue = "";
    this.render();
    if (!this.dialog.open) this.dialog.showModal();
  }

  /** Show what has changed of the request that is looked at. */
  changed(entry) {
    if (this.dialog.open && this.tile.entry === entry) {
      const ended = entry.request.terminal && !this.ended;
      if (ended) this.render();
      else this.renderProgress();
    }
  }

  render() {
    const { request, unit, title } = this.tile;
    this.ended = request.terminal;
    this.stopTimeline?.();
    this.panels = makePanels();
    this.words = el("p", { class: "words" });
    this.problem = el("p", { class: "problem", role: "alert" });
    const timeline = el("div", { class: "timeline" });
    const parts = [
      el("p", { class: "prompt" }, title),
      this.actions(request, unit),
      this.problem,
      this.facts(request, unit),
      timeline,
    ];
    const focused = this.details.contains(document.activeElement); // on a button that goes, such as "Cancel"
    this.details.replaceChildren(...parts);
    if (focused) this.details.querySelector("button").focus();
    this.stopTimeline = mountTimeline(timeline, request.id);
    this.shown = "";
    this.renderProgress();
  }

  renderProgress() {
    const { unit, title } = this.tile;
    const progress = progressOf(unit);
    this.panels.show(progress);
    this.words.textContent = progress.text;
    const artifact = unit.artifact ?? unit.preview ?? unit.previews.at(-1)?.artifact;
    if (unit.state !== "DONE" && !this.stage.contains(this.words)) {
      this.media = el("div", { class: "media" });
      const reason = this.ended ? reasonOf(unit) : "";
      const doing = el("div", { class: "doing" }, !this.ended && this.panels.node, this.words, reason && el("p", { class: "reason" }, reason));
      this.stage.replaceChildren(this.media, doing);
    }
    if (artifact) this.show(artifact, title, unit.state === "DONE");
  }

  async show(artifact, title, done) {
    if (this.shown === artifact.name) return;
    this.shown = artifact.name;
    const media = await makeMedia(artifact, title, { large: true }).catch(async (error) =>
      el("p", { class: "words" }, await mediaProblem(artifact.name, error)));
    if (this.shown !== artifact.name) return;
    if (done) this.stage.replaceChildren(media);
    else this.media.replaceChildren(media);
  }

  actions(request, unit) {
    const done = unit.state === "DONE";
    const run = (work) => () => work().catch((error) => (this.problem.textContent = error.message));
    const here = [
      button("Use again", run(() => (this.leave(), this.composer.useAgain(request, unit)))),
      button("Vary seed", run(() => (this.dialog.close(), this.composer.vary(request)))),
    ];
    if (done) here.push(this.downloadLink(unit.artifact));
    if (done && unit.artifact.content_type.startsWith("image/") && this.composer.slots.length) {
      here.push(button("Edit", run(() => this.edit(unit.artifact))));
    }
    if (request.terminal) here.push(this.deleteButton(request, run));
    else here.push(button("Cancel", run(() => this.gallery.cancel(request)), { class: "danger" }));
    return el("div", { class: "actions" }, here);
  }

  downloadLink(artifact) {
    const link = el("a", { class: "button", download: artifact.name }, "Download");
    mediaUrl(artifact.name).then((url) => (link.href = url), () => link.remove());
    return link;
  }

  /** Delete on the second press: there is no way back. */
  deleteButton(request, run) {
    const count = request.units.length;
    const remove = run(async () => {
      const next = this.tile.node.nextElementSibling?.tile;
      await this.gallery.remove(request);
      if (next && next.entry.id !== request.id) this.open(next);
      else this.dialog.close();
    });
    const made = button("Delete", () => {
      if (made.dataset.sure) return remove();
      made.dataset.sure = "yes";
      made.textContent = count > 1 ? `Delete all ${count}?` : "Delete for good?";
      announce(`${made.textContent} Press again.`);
    }, { class: "danger" });
    made.addEventListener("blur", () => (delete made.dataset.sure, (made.textContent = "Delete")));
    return made;
  }

  async edit(artifact) {
    const blob = await (await call(mediaPath(artifact.name))).blob();
    this.leave();
    this.composer.useImage(new File([blob], artifact.name, { type: blob.type }));
    document.getElementById("prompt").focus();
  }

  facts(request, unit) {
    const { width, height } = request.inputs;
    const took = request.terminal ? request.finished_at - request.created_at : 0;
    const rows = [
      ["Seed", unit.seed],
      width && height && ["Size", `${width} × ${height}`],
      ...Object.entries(request.inputs)
        .filter(([name, value]) => !NOT_PARAMETERS.has(name) && value !== null && value !== "")
        .map(([name, value]) => [labelOf(name), said(value)]),
      ["Model", request.model],
      request.priority && ["Priority", request.priority],
      request.deadline_s && ["Deadline", duration(request.deadline_s) + ({ true: ", kept", false: ", missed" }[request.deadline_met] ?? "")],
      ["Accepted", moment(request.created_at)],
      took > 0 && ["Took", duration(took)],
      ["Request", request.id],
    ];
    return el("dl", {}, rows.filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
  }

  turn(event) {
    if (event.target.closest("video, audio, input") || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const node = event.key === "ArrowLeft" ? this.tile.node.previousElementSibling : this.tile.node.nextElementSibling;
    if (node?.tile) this.open(node.tile);
  }

  /** Close in favour of the prompt box: the event `close` comes after that has got the focus, and leaves it there. */
  leave() {
    this.dialog.close(LEFT);
  }

  closed() {
    this.stopTimeline?.();
    this.stopTimeline = null;
    this.stage.replaceChildren();
    this.details.replaceChildren();
    if (this.dialog.returnValue !== LEFT) this.tile.frame.focus({ preventScroll: true });
  }
}

function said(value) {
  if (Array.isArray(value) && value[0]?.bytes !== undefined) return `${value.length} ${value.length > 1 ? "files" : "file"}`;
  return typeof value === "object" ? JSON.stringify(value) : value;
}

// The live map: hosts, the processes on them, their queues, credits and pools. What falls is seen to fall and to come back.

import { follow } from "./api.js";
import { STAGES, STATE_OF_STAGE } from "./constants.js";
import { CROSS, duration, el, makeIcon, setText } from "./dom.js";

const SERVICES = ["api", "head", "pool"];
const SILENT_MS = 4000;
const LOG_LENGTH = 8;
const MANY = 24;

/** What the states of a process mean to the eye: a group has a colour and a shape; the word is always there as well. */
const GROUPS = {
  up: { states: ["ready"], path: "M8 1a7 7 0 1 0 0 14A7 7 0 0 0 8 1zM6.9 11.4 3.7 8.2l1.3-1.3 1.9 1.9 4.2-4.2 1.3 1.3z" },
  asleep: { states: ["asleep"], path: "M6.2 1.2a7 7 0 1 0 8.6 8.6A5.6 5.6 0 0 1 6.2 1.2z" },
  coming: {
    states: ["starting", "loading", "joining", "waking"],
    path: "M8 1a7 7 0 1 0 7 7h-2.2A4.8 4.8 0 1 1 8 3.2zM10 1.3v2.3a4.8 4.8 0 0 1 2.5 2.4h2.2A7 7 0 0 0 10 1.3z",
  },
  leaving: { states: ["draining", "stopped"], path: "M1.5 1.5h13v13h-13zM4 4v8h8V4z" },
  down: {
    states: ["down", "backoff", "delayed", "crashed", "hung"],
    path: CROSS,
  },
  gone: { states: ["failed", "gave_up"], path: "M5 1h6l4 4v6l-4 4H5l-4-4V5zM4 7v2h8V7z" },
};
const WORDS = {
  down: "does not answer",
  backoff: "fallen",
  delayed: "cannot start yet",
  failed: "cannot start",
  gave_up: "given up",
};

const ENDED = ["backoff", "delayed", "crashed", "hung"];

/** Return the group of a state, "down" for one that is not known here. */
export function groupOf(state) {
  return Object.keys(GROUPS).find((group) => GROUPS[group].states.includes(state)) ?? "down";
}

function isUp(group) {
  return group === "up" || group === "asleep";
}

/** Return the sentences about a process between two views of it: that it fell, that it is back after so many seconds. */
export function newsOf(before, now, away = 0) {
  if (!before) return [];
  const name = now.component;
  const [was, is] = [groupOf(before.state), groupOf(now.state)];
  const newer = before.upGeneration !== undefined && now.generation > before.upGeneration;
  const news = [];
  const tell = (kind, text) => news.push({ kind, text: `${name} ${text}.` });
  if (is === "gone" && was !== "gone") tell("fall", `is given up: ${now.reason}`);
  else if (ENDED.includes(now.state) && !ENDED.includes(before.state)) tell("fall", endOf(now));
  else if (now.state === "down" && isUp(was)) tell("fall", "does not answer");
  else if (newer && isUp(was) && is !== "leaving") tell("fall", endOf(now)); // its fall was too short to be seen
  else if (is === "leaving" && was !== is) tell("leave", `is ${now.state}`);
  if (!isUp(is) || (isUp(was) && !newer)) return news;
  const times = count(now.restarts, "restart");
  if (before.upGeneration === undefined) tell("rise", `is up, after ${times}`);
  else if (newer) tell("rise", `is back${away ? ` after ${duration(away)}` : ""}, ${times} so far`);
  else if (before.state === "down") tell("rise", "answers again");
  return news;
}

function endOf({ reason }) {
  const killed = /^killed by (SIG\w+)/.exec(reason ?? "");
  if (killed) return `was killed (${killed[1]})`;
  return reason ? `has ended: ${reason.replace(/\.$/, "")}` : "has ended";
}

/** Show the live map in an element; returns the function that stops it. */
export function mountCluster(root) {
  const map = new ClusterMap(root);
  return () => map.stop();
}

class ClusterMap {
  constructor(root) {
    this.processes = new Map(); // what is known of each, by the name of its component
    this.cards = new Map();
    this.hosts = new Map();
    this.title = el("p", { class: "map-summary" });
    this.queues = el("ol", { class: "map-queues", "aria-label": "Images that wait and run, by stage" });
    this.stages = new Map(STAGES.map((stage) => [stage, makeQueue(stage)]));
    this.queues.append(...[...this.stages.values()].map(({ node }) => node));
    this.frames = el("div", { class: "map-hosts" });
    this.log = el("ol", { class: "map-log" });
    this.nothing = el("p", { class: "map-nothing" }, "Nothing has fallen while this page was open.");
    this.root = el(
      "div",
      { class: "map", "data-link": "waiting" },
      el("div", { class: "map-drawing" }, this.title, this.queues, this.frames),
      el("section", { class: "map-news" }, el("h2", { id: "map-log-title" }, "What happened"), this.nothing,
        el("div", { role: "log", "aria-live": "polite", "aria-labelledby": "map-log-title" }, this.log)),
    );
    setText(this.title, "Connecting …");
    root.replaceChildren(this.root);
    this.whenSeen = () => this.listen();
    document.addEventListener("visibilitychange", this.whenSeen);
    this.watching = setInterval(() => this.checkSilence(), 1000);
    this.listen();
  }

  stop() {
    document.removeEventListener("visibilitychange", this.whenSeen);
    clearInterval(this.watching);
    this.following?.abort();
    this.root.remove();
  }

  /** Follow the cluster while the page can be seen: a browser has few connections to a server. */
  listen() {
    if (document.hidden) {
      this.following?.abort();
      this.following = null;
    } else if (!this.following) {
      this.heardAt = performance.now();
      this.following = new AbortController();
      follow("v1/cluster/events", (name, data) => this.take(name, data), this.following.signal).catch((error) => {
        this.root.dataset.link = "lost";
        setText(this.title, error.message);
      });
    }
  }

  take(name, data) {
    this.heardAt = performance.now();
    this.root.dataset.link = "live";
    if (name === "component") {
      this.update(data);
      this.showSummary();
    }
    if (name === "cluster") this.show(data);
  }

  checkSilence() {
    if (this.following && this.root.dataset.link === "live" && performance.now() - this.heardAt > SILENT_MS) {
      this.root.dataset.link = "lost";
      setText(this.title, "No news from the API: trying to reach it again …");
    }
  }

  show(snapshot) {
    this.snapshot = snapshot;
    this.placeHosts(snapshot.hosts);
    const firsts = snapshot.actors.filter((actor) => actor.name === actor.component);
    for (const row of firsts) this.update({ reason: "", ...row });
    for (const pool of snapshot.pools) this.cards.get(pool.name)?.showPool(pool);
    for (const name of this.processes.keys()) {
      if (!firsts.some((row) => row.name === name)) this.forget(name);
    }
    this.showQueues(snapshot);
    this.showSummary();
  }

  placeHosts(hosts) {
    for (const host of hosts.length ? hosts : [{ name: "", address: "", state: "" }]) {
      if (!this.hosts.has(host.name)) {
        const frame = makeHost(host, `host-${this.hosts.size}`);
        this.hosts.set(host.name, frame);
        this.frames.append(frame.node);
      }
      this.hosts.get(host.name).state = host.state;
    }
  }

  /** Take what is known of one process now, say what has happened to it, and draw it. */
  update(row) {
    const name = row.component;
    const before = this.processes.get(name);
    const now = { ...before, uptime_s: 0, missed: 0, ...row };
    // On a busy machine an answer may be late once; its supervisor tells when it has ended.
    if (before && row.state === "down" && isUp(groupOf(before.state)) && !before.missed) Object.assign(now, before, { missed: 1 });
    if (before && now.generation < before.generation) now.generation = before.generation; // nobody knows it while it is away
    const up = isUp(groupOf(now.state));
    now.awayAt = up ? 0 : before && isUp(groupOf(before.state)) ? performance.now() : before?.awayAt;
    const away = up && before?.awayAt ? (performance.now() - before.awayAt) / 1000 : 0;
    if (row.reason === "") now.reason = before?.reason || (["down", "gone"].includes(groupOf(now.state)) ? row.detail : "");
    if (up) now.upGeneration = now.generation;
    this.processes.set(name, now);
    const card = this.cards.get(name) ?? this.addCard(now);
    if (!card) return;
    card.show(now);
    for (const { kind, text } of newsOf(before, now, away)) {
      card.move(kind);
      this.tell(kind, text);
    }
  }

  addCard(row) {
    const host = this.hosts.get(row.host ?? "") ?? this.hosts.values().next().value;
    if (!host) return null;
    const card = new Card(row);
    this.cards.set(row.component, card);
    host.add(row.kind, card.node);
    return card;
  }

  forget(name) {
    this.cards.get(name)?.node.remove();
    this.cards.delete(name);
    this.processes.delete(name);
  }

  tell(kind, text) {
    this.nothing.hidden = true;
    const time = new Date();
    const clock = time.toLocaleTimeString(undefined, { hour12: false });
    this.log.prepend(el("li", { "data-kind": kind }, icon(kind === "rise" ? "up" : kind === "fall" ? "down" : "leaving"), el("span", {}, text), el("time", { datetime: time.toISOString() }, clock)));
    while (this.log.children.length > LOG_LENGTH) this.log.lastChild.remove();
  }

  showQueues({ head, actors }) {
    const states = head?.states ?? {};
    for (const [stage, queue] of this.stages) {
      const instances = actors.filter(({ kind, slots }) => kind === stage && slots !== undefined);
      const named = STATE_OF_STAGE[stage];
      const here = (states[`${named}_WAITING`] ?? 0) + (states[`${named}_RUNNING`] ?? 0) + (stage === "encoder" ? states.PENDING ?? 0 : 0);
      const assigned = instances.reduce((sum, { running }) => sum + running.length, 0) || states[`${named}_RUNNING`] || 0;
      queue.show(Math.max(0, here - assigned), assigned);
    }
  }

  /** Sum up what is known now, which may be newer than the snapshot. */
  showSummary() {
    if (!this.snapshot) return;
    const { ready, reasons, head } = this.snapshot;
    const all = [...this.processes.values()];
    const up = (rows) => rows.filter(({ state }) => isUp(groupOf(state))).length;
    for (const [name, host] of this.hosts) {
      const here = all.filter((row) => (row.host ?? "") === name);
      host.show(up(here), here.length);
    }
    const underWay = Object.values(head?.states ?? {}).reduce((sum, number) => sum + number, 0);
    const parts = [
      ready ? "Serving" : `Not serving: ${reasons[0] ?? "it starts"}`,
      `${up(all)} of ${count(all.length, "process", "processes")} up`,
      `${count(underWay, "image")} under way`,
      ...(head ? [`${head.completed} made since the head started`] : []),
    ];
    setText(this.title, parts.join(" · "));
  }
}

function makeQueue(stage) {
  const dots = el("span", { class: "dots", "aria-hidden": "true" });
  const text = el("span", { class: "queue-text" });
  const node = el("li", { class: "queue", "data-stage": stage }, el("span", { class: "queue-name" }, stage), text, dots);
  return {
    node,
    show(waiting, assigned) {
      setText(text, `${waiting} waiting, ${assigned} assigned`);
      showMarks(dots, waiting, "i");
    },
  };
}

/** Show so many marks; of very many, some and the number of the others. */
function showMarks(parent, number, tag) {
  const shown = Math.min(number, MANY);
  while (parent.children.length > shown) parent.lastChild.remove();
  while (parent.children.length < shown) parent.append(el(tag));
  if (number > MANY) parent.dataset.more = `+${number - MANY}`;
  else delete parent.dataset.more;
}

function makeHost({ name, address }, id) {
  const state = el("span", { class: "host-state" });
  const heading = el("h2", { id }, name ? `Host ${name}` : "This machine");
  const where = el("span", { class: "host-address" }, address);
  const services = el("ul", { class: "services", "aria-label": `Services${name ? ` of host ${name}` : ""}` });
  const instances = el("ul", { class: "instances", "aria-label": `Instances${name ? ` of host ${name}` : ""}` });
  const pools = el("ul", { class: "pools", "aria-label": `Buffer pools${name ? ` of host ${name}` : ""}` });
  const node = el(
    "section",
    { class: "host", "aria-labelledby": id },
    el("header", {}, heading, where, state),
    services,
    instances,
    pools,
  );
  return {
    node,
    add(kind, card) {
      const list = kind === "pool" ? pools : SERVICES.includes(kind) ? services : instances;
      const order = (item) => SERVICES.indexOf(item.dataset.kind) * 10 + STAGES.indexOf(item.dataset.kind);
      const after = [...list.children].find((other) => order(other) > order(card));
      list.insertBefore(card, after ?? null);
    },
    state: "",
    show(up, all) {
      const down = this.state === "down";
      node.dataset.group = down ? "down" : up === all ? "up" : "coming";
      const text = down ? "does not answer" : `${up} of ${all} up`;
      if (state.dataset.text !== text) {
        state.dataset.text = text;
        state.replaceChildren(icon(node.dataset.group), text);
      }
      for (const list of [services, instances, pools]) list.hidden = !list.children.length;
      instances.dataset.alike = new Set([...instances.children].map((card) => card.dataset.kind)).size === 1;
    },
  };
}

/** One process: its name, state, slots and what became of it before. */
class Card {
  constructor({ component, kind }) {
    this.state = el("span", { class: "card-state" });
    this.slots = el("span", { class: "card-slots", "aria-hidden": "true" });
    this.load = el("p", { class: "card-load" });
    this.life = el("p", { class: "card-life" });
    this.generation = el("p", { class: "card-life" });
    this.reason = el("p", { class: "card-reason" });
    this.meter = el("span", { class: "card-meter", "aria-hidden": "true" }, el("i"));
    this.node = el(
      "li",
      { class: "card", "data-component": component, "data-kind": kind },
      el("p", { class: "card-head" }, el("strong", {}, component), this.state),
      ...(kind === "pool" ? [this.meter] : []),
      this.slots,
      this.load,
      this.reason,
      this.life,
      this.generation,
    );
    this.meter.hidden = true;
  }

  show(row) {
    const group = groupOf(row.state);
    const word = WORDS[row.state] ?? row.state;
    if (this.node.dataset.state !== row.state) {
      this.node.dataset.state = row.state;
      this.node.dataset.group = group;
      this.state.replaceChildren(icon(group), word);
    }
    this.showLoad(row, group);
    const detail = row.detail && row.detail !== row.reason ? row.detail : "";
    setText(this.reason, group === "up" ? "" : group === "coming" ? detail : row.reason || detail);
    const uptime = isUp(group) && row.uptime_s ? `up ${since(row.uptime_s)}, ` : "";
    // Of one that nobody knows, as while its host is away, there is no number.
    setText(this.life, row.generation ? `${uptime}${count(row.restarts, "restart")}` : "");
    setText(this.generation, row.generation ? `generation ${row.generation}` : "");
    this.node.dataset.generation = row.generation;
  }

  showLoad(row, group) {
    if (row.slots === undefined) {
      if (row.kind === "api" && row.facts) setText(this.load, count(row.facts.connections ?? 0, "connection"));
      else if (row.mailbox_depth) setText(this.load, `${count(row.mailbox_depth, "message")} in its mailbox`);
      else if (row.kind !== "pool") setText(this.load, "");
      return;
    }
    const away = !["up", "asleep", "leaving"].includes(group);
    const busy = away ? 0 : row.running.length;
    const credits = away ? 0 : Math.max(0, row.credits);
    showMarks(this.slots, row.slots, "i");
    [...this.slots.children].forEach((slot, index) => {
      slot.dataset.use = index < busy ? "busy" : index < busy + credits ? "free" : "none";
    });
    setText(this.load, away ? "takes nothing" : `${busy} of ${count(row.slots, "slot")} busy, ${count(credits, "credit")}`);
  }

  showPool({ capacity, leased, transport }) {
    this.meter.hidden = !capacity;
    if (!capacity) return setText(this.load, "");
    this.meter.firstChild.style.setProperty("--used", leased / capacity);
    setText(this.load, `${bytes(leased)} of ${bytes(capacity)} leased, ${transport}`);
  }

  /** Let the eye see what has happened; style.css of the map leaves the motion out where it is not wanted. */
  move(kind) {
    this.node.classList.remove("falls", "rises");
    void this.node.offsetWidth; // so that the same motion begins again
    if (kind === "fall") this.node.classList.add("falls");
    if (kind === "rise") this.node.classList.add("rises");
  }
}

function icon(group) {
  return makeIcon(GROUPS[group].path);
}

function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

function since(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} days`;
}

function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const unit = number ? Math.min(units.length - 1, Math.floor(Math.log2(number) / 10)) : 0;
  const scaled = number / 1024 ** unit;
  return `${unit === 0 || scaled >= 100 ? Math.round(scaled) : scaled.toPrecision(3)} ${units[unit]}`;
}

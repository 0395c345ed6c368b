// An image with fetch, by Node 18 or a browser, with its progress as it comes: node generate.mjs PROMPT FILE
import { writeFile } from "node:fs/promises";

const [prompt, file] = process.argv.slice(2);
const url = process.env.TRIPTYCH_URL ?? "http://127.0.0.1:8000";
const key = process.env.TRIPTYCH_API_KEY;
const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };

async function ask(path, options = {}) {
  const answer = await fetch(url + path, { ...options, headers: { ...headers, ...options.headers } });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}

// The request runs on, whoever listens: what happens to it comes as events.
const body = JSON.stringify({ prompt, seed: 7 });
const accepted = await ask("/v1/images/generations", { method: "POST", body, headers: { Prefer: "respond-async" } });
const { id } = await accepted.json();
const events = await ask(`/v1/requests/${id}/events`);
let text = "";
for await (const part of events.body.pipeThrough(new TextDecoderStream())) {
  text += part;
  const whole = text.split("\n\n");
  text = whole.pop();
  for (const event of whole) {
    const name = event.match(/^event: (.*)$/m)?.[1];
    const data = event.match(/^data: (.*)$/m)?.[1];
    if (name === "step") console.log(`step ${JSON.parse(data).step} of ${JSON.parse(data).total_steps}`);
    if (name !== "ended") continue;
    const [unit] = JSON.parse(data).units;
    if (!unit.artifact) throw new Error(unit.causes.join("; ") || JSON.parse(data).state);
    const image = await ask(`/v1/images/${unit.artifact.name}`);
    await writeFile(file, Buffer.from(await image.arrayBuffer()));
  }
}

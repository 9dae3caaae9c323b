"use strict";
// The chat page: one conversation, kept in this browser, streamed from the server it came from.

const part = (id) => document.getElementById(id);
const [log, form, text, send, stop, status] = ["log", "form", "text", "send", "stop", "status"].map(part);
const settings = ["temperature", "tokens", "key"];
let messages = [];
let running = null;

function load() {
  try {
    messages = JSON.parse(localStorage.getItem("messages")) || [];
  } catch {
    messages = [];
  }
  for (const name of settings) {
    const kept = localStorage.getItem(name);
    if (kept !== null) part(name).value = kept;
  }
}

function keep() {
  localStorage.setItem("messages", JSON.stringify(messages));
}

function bubble(message) {
  const box = document.createElement("div");
  box.className = "message " + (message.role === "user" ? "user" : "assistant");
  box.textContent = message.content;
  log.append(box);
  log.scrollTop = log.scrollHeight;
  return box;
}

function say(words, wrong = false) {
  status.textContent = words;
  status.className = wrong ? "error" : "";
}

function headers() {
  const all = { "content-type": "application/json" };
  const key = part("key").value.trim();
  if (key) all.authorization = "Bearer " + key;
  return all;
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return "the server answered " + response.status;
  }
}

// The data of server-sent events, one by one.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) yield line.slice(6);
    }
  }
}

async function answer() {
  const talk = messages;
  const message = { role: "assistant", content: "" };
  const box = bubble(message);
  running = new AbortController();
  send.hidden = true;
  stop.hidden = false;
  say("reading …");
  let usage = null;
  let shown = 0;
  const show = () => {
    const below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    box.textContent = message.content;
    if (below) log.scrollTop = log.scrollHeight;
    if (running) say("writing …");
  };
  const began = performance.now();
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        messages: talk,
        stream: true,
        stream_options: { include_usage: true },
        temperature: Number(part("temperature").value),
        max_tokens: Number(part("tokens").value),
      }),
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      usage = piece.usage || usage;
      const fresh = piece.choices.length ? piece.choices[0].delta.content : "";
      if (fresh) {
        message.content += fresh;
        // A fast model gives more pieces than a page can show: show some, and let the page live.
        if (performance.now() - shown > 50) {
          show();
          await new Promise((go) => setTimeout(go));
          shown = performance.now();
        }
      }
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say(usage ? `${usage.completion_tokens} tokens in ${seconds} s, ${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} prompt tokens kept` : "");
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(error.message, true);
  }
  running = null;
  show();
  send.hidden = false;
  stop.hidden = true;
  if (message.content) {
    talk.push(message);
    keep();
  } else {
    box.remove();
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const content = text.value.trim();
  if (!content || running) return;
  text.value = "";
  messages.push({ role: "user", content });
  bubble(messages.at(-1));
  keep();
  answer();
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => running && running.abort());
part("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages = [];
  keep();
  log.replaceChildren();
  say("");
});
for (const name of settings) {
  part(name).addEventListener("change", () => {
    localStorage.setItem(name, part(name).value);
    if (name === "key") greet();
  });
}

async function greet() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await problem(response));
    part("model").textContent = (await response.json()).data[0].id;
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

load();
messages.forEach(bubble);
greet();

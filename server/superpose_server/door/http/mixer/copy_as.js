/** The request for a text as a command line or a program, to run as it is. */

import { textRequest } from "./generation.js";
import { formatMix } from "./mix.js";
import { say } from "./state.js";
import { useStore } from "./store.js";
import { token } from "./token.js";
import { html, useState } from "./vendor/htm-preact.js";

/**
 * @typedef {import("./state.js").Prompt} Prompt
 * @typedef {import("./mix.js").Mix} Mix
 *
 * @typedef {object} Asked
 * @property {Prompt} prompt
 * @property {Mix} mix
 * @property {URL} site  Where the page came from.
 * @property {string} grpc  HOST:PORT of gRPC.
 * @property {boolean} [token]  Whether to send a token, which adapterctl takes by itself from where the
 *   others do.
 */

// What adapterctl asks if it is told no other.
const DEFAULT_GRPC = "127.0.0.1:50051";
// Where a token is looked for, which is not written out for others to see.
const TOKEN = "SUPERPOSE_TOKEN";
const HELD = `os.environ["${TOKEN}"]`;

/** @type {ReadonlyMap<string, (asked: Asked) => string>} By name of the way. */
export const WAYS = new Map([
  ["adapterctl", asAdapterctl],
  ["curl", asCurl],
  ["Python client", asPython],
  ["OpenAI client", asOpenAI],
]);

/** @param {{store: import("./state.js").Store}} props */
export function CopyAs({ store }) {
  const prompt = useStore(store, (state) => state.prompt);
  const mix = useStore(store, (state) => state.mine);
  const listening = useStore(store, (state) => state.server?.grpc_address ?? DEFAULT_GRPC);
  const [way, setWay] = useState("adapterctl");
  const [open, setOpen] = useState(false);
  const site = new URL(".", document.baseURI);
  const asked = { prompt, mix, site, grpc: reachable(listening, site), token: token() !== "" };
  const written = /** @type {(asked: Asked) => string} */ (WAYS.get(way))(asked);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(written);
      say(store, `Copied, for ${way}.`);
    } catch {
      say(store, "The browser does not let pages copy here: select the text and copy it.");
    }
  };
  return html`
    <details class="copy-as" open=${open} onToggle=${(/** @type {any} */ event) => setOpen(event.currentTarget.open)}>
      <summary>Copy as a command or program</summary>
      <div class="chips" role="group" aria-label="As">
        ${[...WAYS.keys()].map(
          (name) => html`
            <button type="button" class="chip" key=${name} aria-pressed=${name === way ? "true" : "false"}
              onClick=${() => setWay(name)}>${name}</button>
          `,
        )}
      </div>
      <pre tabindex="0" aria-label="The request, for ${way}"><code>${written}</code></pre>
      <button type="button" onClick=${copy}>Copy</button>
      <span class="hint">The prompt under the sliders' mix.</span>
    </details>
  `;
}

/**
 * Return where gRPC is reached: an address of every interface is none to connect to, but the page
 * came from one.
 * @param {string} listening @param {URL} site @returns {string}
 */
function reachable(listening, site) {
  return listening.replace(/^(0\.0\.0\.0|\[::\])(?=:)/, site.hostname);
}

/** @param {URL} site  A server has certificates for both of its doors, or for none. */
const encrypted = (site) => site.protocol === "https:";

/** @param {Asked} asked */
function asAdapterctl({ prompt, mix, grpc, site }) {
  const { text, chat, maxTokens, temperature, seed } = prompt;
  const options = [
    ...(grpc === DEFAULT_GRPC ? [] : [`--server ${shell(grpc)}`]),
    ...(encrypted(site) ? ["--tls"] : []),
    `--mix ${shell(formatMix(mix))} --max-new-tokens ${maxTokens} --temperature ${temperature} --seed ${seed}`,
  ];
  if (!chat) return [`adapterctl generate ${options.join(" ")}`, `-- ${shell(text)}`].join(" \\\n  ");
  // `chat` reads a message a line, and takes some lines for commands.
  if (/[\r\n]|^\//.test(text)) return "# adapterctl chat cannot be sent this message: use the Python client\n";
  return `printf '%s\\n' ${shell(text)} | adapterctl chat ${options.join(" ")}`;
}

/** @param {Asked} asked */
function asCurl({ prompt, mix, site, token }) {
  const { path, body } = textRequest(prompt, mix);
  return [
    `curl ${shell(new URL(path, site).href)}`,
    "-H 'Content-Type: application/json'",
    ...(token ? [`-H "Authorization: Bearer $${TOKEN}"`] : []),
    `-d ${shell(JSON.stringify(body))}`,
  ].join(" \\\n  ");
}

/** @param {Asked} asked */
function asPython({ prompt, mix, grpc, site, token }) {
  const { text, chat, maxTokens, temperature, seed } = prompt;
  const [os, held] = token ? ["import os\n\n", `, token=${HELD}`] : ["", ""];
  const tls = encrypted(site) ? ", tls=True" : "";
  return `${os}from superpose_client import Client

prompt = ${chat ? `[{"role": "user", "content": ${python(text)}}]` : python(text)}
with Client(${python(grpc)}${tls}${held}) as client:
    for chunk in client.stream(
        prompt,
        mix=${python(formatMix(mix))},
        max_new_tokens=${maxTokens},
        temperature=${temperature},
        seed=${seed},
    ):
        print(chunk.text, end="", flush=True)
`;
}

/** @param {Asked} asked */
function asOpenAI({ prompt, mix, site, token }) {
  const { text, chat, maxTokens, temperature, seed } = prompt;
  const call = chat ? "chat.completions" : "completions";
  const said = chat ? `messages=[{"role": "user", "content": ${python(text)}}]` : `prompt=${python(text)}`;
  const [os, key] = token ? ["import os\n\n", HELD] : ["", python("none")];
  return `${os}from openai import OpenAI

client = OpenAI(base_url=${python(new URL("v1", site).href)}, api_key=${key})
answer = client.${call}.create(
    model=${python(formatMix(mix))},
    ${said},
    max_tokens=${maxTokens},
    temperature=${temperature},
    seed=${seed},
)
print(answer.choices[0].${chat ? "message.content" : "text"})
`;
}

/** @param {string} text @returns {string} One word of a POSIX shell. */
function shell(text) {
  return /^[\w./:=,@-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`;
}

/** @param {string} text @returns {string} A string literal of Python, which reads JSON's. */
function python(text) {
  return JSON.stringify(text);
}

/**
 * Mixes: {domain: weight}, immutable; 0 is absent, the empty mix is the base model.
 *
 * A mix is a Map, because any name may be a domain's, `constructor` too. It is never changed.
 * @typedef {ReadonlyMap<string, number>} Mix
 */

/** @type {Mix} */
export const BASE = new Map();
export const MAX_WEIGHT = 1e4;

const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
const NAME = /^[a-z0-9][a-z0-9._-]{0,63}$/;

/**
 * Return the mix of these weights.
 * @param {Iterable<readonly [string, number]>} weights
 * @returns {Mix}
 */
export function mixOf(weights) {
  return new Map([...weights].filter(([, weight]) => weight !== 0));
}

/**
 * Return the mix of a MixState of the server.
 * @param {{entries: {domain: string, weight: number}[]}} state
 * @returns {Mix}
 */
export function mixOfState(state) {
  return mixOf(state.entries.map(({ domain, weight }) => [domain, weight]));
}

/**
 * Return `mix` with another weight of one domain.
 * @param {Mix} mix @param {string} domain @param {number} weight @returns {Mix}
 */
export function withWeight(mix, domain, weight) {
  return mixOf(new Map(mix).set(domain, weight));
}

/** @param {Mix} one @param {Mix} other @returns {boolean} */
export function sameMix(one, other) {
  return one.size === other.size && [...one].every(([name, weight]) => other.get(name) === weight);
}

/**
 * Return a mix as the JSON of a request.
 * @param {Mix} mix @returns {Record<string, number>}
 */
export function mixToJson(mix) {
  return Object.fromEntries(mix);
}

/**
 * Return a mix in MIX syntax, to the last bit.
 * @param {Mix} mix @returns {string}
 */
export function formatMix(mix) {
  return [...mix].map(([name, weight]) => `${name}=${weight}`).join(",") || "base";
}

/**
 * Return the mix that `text` writes in MIX syntax, names of mixes resolved.
 * @param {string} text
 * @param {ReadonlyMap<string, Mix>} named  Mixes that have names.
 * @param {Mix} defaultMix  What `default` means.
 * @returns {Mix}
 * @throws {Error}  One line that names what is wrong.
 */
export function parseMix(text, named, defaultMix) {
  const written = text.trim();
  if (written === "base") return BASE;
  if (written === "default") return defaultMix;
  if (written === "") throw new Error("the mix is empty: write base, or a domain and its weight");
  const seen = new Set();
  /** @type {Map<string, number>} */
  const sum = new Map();
  for (const part of written.split(/[,;]/)) {
    const [name, weight] = parsePart(part);
    if (seen.has(name)) throw new Error(`${name} is named twice: name each domain once`);
    seen.add(name);
    for (const [domain, times] of named.get(name) ?? new Map([[name, 1]])) {
      sum.set(domain, (sum.get(domain) ?? 0) + weight * times);
    }
  }
  return mixOf(sum);
}

/** @param {string} part @returns {[string, number]} */
function parsePart(part) {
  const equals = part.indexOf("=");
  const name = (equals < 0 ? part : part.slice(0, equals)).trim();
  if (!NAME.test(name)) {
    throw new Error(`"${name}" is no name of a domain or mix: write it as in math=1,medicine=0.5`);
  }
  if (name === "base" || name === "default") {
    throw new Error(`${name} is a mix of its own: write it alone, or leave it out`);
  }
  return [name, equals < 0 ? 1 : parseWeight(part.slice(equals + 1))];
}

/**
 * Return the weight that `text` writes.
 * @param {string} text
 * @returns {number}
 * @throws {Error}  One line that says what a weight is.
 */
export function parseWeight(text) {
  const written = text.trim();
  const weight = NUMBER.test(written) ? Number(written) : NaN;
  if (!(Math.abs(weight) <= MAX_WEIGHT)) {
    throw new Error(`"${written}" is no weight: write a number from -${MAX_WEIGHT} to ${MAX_WEIGHT}`);
  }
  return weight;
}

/**
 * Return what differs between two mixes: each domain with its weight in both, 0 where absent.
 * @param {Mix} before @param {Mix} after
 * @returns {{domain: string, before: number, after: number}[]}
 */
export function changes(before, after) {
  return [...new Set([...before.keys(), ...after.keys()])]
    .sort()
    .map((domain) => ({
      domain,
      before: before.get(domain) ?? 0,
      after: after.get(domain) ?? 0,
    }))
    .filter((each) => each.before !== each.after);
}

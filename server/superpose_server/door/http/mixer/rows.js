/** Texts and rows of question-answer data, told apart as `adapterctl` tells them: by what they hold. */

/**
 * @typedef {{text: string} | {question_answer: {question: string, answer: string}}} Item  As the
 *     server takes it.
 */

const LOOKS_LIKE_JSON = /^\s*(?:\{|\[\s*(?:[[{"]|\]\s*$))/;
const AS_TEXT = 'to measure it as a text, write it as a row {"text": ...}';

/**
 * Return what `content` holds: rows in JSON, one a line or an array of them, or else a text a line.
 * @param {string} content
 * @param {boolean} isJson  Whether it must be JSON, by its name; otherwise what it holds tells that.
 * @returns {Item[]}
 * @throws {Error}  One line that names the line at fault.
 */
export function readRows(content, isJson = false) {
  const whole = content.replace(/^\uFEFF/, "");
  if (!isJson && !LOOKS_LIKE_JSON.test(whole)) return textsOf(whole);
  if (whole.trimStart().startsWith("[")) {
    const rows = parse(whole, "the array");
    return rows.map((/** @type {unknown} */ row, /** @type {number} */ at) => itemOf(row, `item ${at + 1}`));
  }
  return linesOf(whole).map(({ line, place }) => itemOf(parse(line, place), place));
}

/** @param {string} content @returns {Item[]} */
function textsOf(content) {
  return linesOf(content).map(({ line, place }) => {
    if (LOOKS_LIKE_JSON.test(line) && isJson(line)) {
      throw new Error(`${place} is a row among texts: ${AS_TEXT}, as all other lines`);
    }
    return { text: line };
  });
}

/** @param {string} content */
function linesOf(content) {
  return content
    .split(/\r?\n/)
    .map((line, at) => ({ line, place: `line ${at + 1}` }))
    .filter(({ line }) => line.trim() !== "");
}

/** @param {string} json @param {string} place @returns {any} */
function parse(json, place) {
  try {
    return JSON.parse(json);
  } catch (error) {
    throw new Error(`${place} is not JSON: ${/** @type {Error} */ (error).message}; ${AS_TEXT}`);
  }
}

/** @param {string} line */
function isJson(line) {
  try {
    JSON.parse(line);
    return true;
  } catch {
    return false;
  }
}

/** @param {any} row @param {string} place @returns {Item} */
function itemOf(row, place) {
  const { question, answer, text } = row ?? {};
  if (typeof question === "string" && typeof answer === "string") {
    return { question_answer: { question, answer } };
  }
  if (typeof text === "string") return { text };
  throw new Error(`${place} needs the texts "question" and "answer", or "text"`);
}

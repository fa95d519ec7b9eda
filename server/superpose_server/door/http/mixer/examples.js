/** Prompts to begin with, for domains that the bundled adapters have. */

/** @type {ReadonlyMap<string, string>} Questions by domain. */
export const QUESTIONS = new Map([
  ["math", "a train is running at a speed of 40 km / hr and it crosses a post in 18 seconds . what is the length of the train ?"],
  ["medicine", "What are the treatments for stress ?"],
  ["finance", "How does a credit rating downgrade affect a company's stock price?"],
]);

/**
 * Return a question as the adapters were trained on them.
 * @param {string} question @returns {string}
 */
export function asPrompt(question) {
  return `Question: ${question}\nAnswer:`;
}

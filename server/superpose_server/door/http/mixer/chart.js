/** What charts are drawn with: scales, ticks, and a width that follows the page. */

import { useEffect, useRef, useState } from "./vendor/htm-preact.js";

/**
 * Return where values lie on a line, in proportion to themselves.
 * @param {number} low @param {number} high  The values at its ends.
 * @param {number} start @param {number} end  Where these ends are.
 * @returns {(value: number) => number}
 */
export function linear(low, high, start, end) {
  return (value) => start + ((value - low) / (high - low)) * (end - start);
}

/**
 * The same in proportion to the logarithms of values, which are above 0.
 * @param {number} low @param {number} high @param {number} start @param {number} end
 * @returns {(value: number) => number}
 */
export function logarithmic(low, high, start, end) {
  const scale = linear(Math.log(low), Math.log(high), start, end);
  return (value) => scale(Math.log(value));
}

/** Within a power of ten, ever fewer. */
const STEPS = [
  Array.from({ length: 90 }, (_, at) => (10 + at) / 10),
  [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 8.5, 9, 9.5],
  [1, 1.5, 2, 3, 5, 7],
  [1, 2, 5],
];

/**
 * Return round values within a range above 0, at most `most` of them; some, if it is a tenth wide.
 * @param {number} low @param {number} high @param {number} most
 * @returns {number[]}
 */
export function logarithmicTicks(low, high, most) {
  const [first, last] = [Math.log10(low), Math.log10(high)];
  for (const steps of STEPS) {
    const ticks = [];
    for (let power = Math.floor(first); power <= last; power++) {
      for (const step of steps) {
        const value = step * 10 ** power;
        if (value >= low && value <= high) ticks.push(value);
      }
    }
    if (ticks.length <= most) return ticks;
  }
  const apart = Math.ceil((last - first) / (most - 1));
  const ticks = [];
  for (let power = Math.ceil(first / apart) * apart; power <= last; power += apart) ticks.push(10 ** power);
  return ticks;
}

/** @param {number} value  A perplexity or a loss. @returns {string} Four digits that matter. */
export function short(value) {
  if (value >= 1e6) return value.toExponential(1);
  return value >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

/**
 * Return what to refer to an element by, and its width in pixels, whenever that changes.
 * @param {number} first  Until it is known.
 * @returns {[{current: any}, number]}
 */
export function useWidth(first) {
  const element = useRef(/** @type {Element | null} */ (null));
  const [width, setWidth] = useState(first);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.round(entry.contentRect.width)));
    if (element.current) observer.observe(element.current);
    return () => observer.disconnect();
  }, []);
  return [element, width];
}

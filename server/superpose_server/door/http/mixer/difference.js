/** Which words several texts share, and so which differ. */

const WORD = /\S+/g;

/**
 * Return the pieces of a text, words and the blanks between them, in their order.
 * @param {string} text @returns {{text: string, word: boolean}[]}
 */
export function pieces(text) {
  const found = [];
  let end = 0;
  for (const match of text.matchAll(WORD)) {
    if (match.index > end) found.push({ text: text.slice(end, match.index), word: false });
    found.push({ text: match[0], word: true });
    end = match.index + match[0].length;
  }
  if (end < text.length) found.push({ text: text.slice(end), word: false });
  return found;
}

/**
 * Return for each word of each text how many of the other texts have it too.
 *
 * Two texts have a word in common where a longest alignment of the two matches it.
 * @param {readonly (readonly string[])[]} texts  The words of each.
 * @returns {number[][]}
 */
export function sharedBy(texts) {
  const counts = texts.map((words) => words.map(() => 0));
  texts.forEach((one, i) => {
    for (let j = i + 1; j < texts.length; j++) {
      const [inOne, inOther] = common(one, texts[j]);
      for (const index of inOne) counts[i][index]++;
      for (const index of inOther) counts[j][index]++;
    }
  });
  return counts;
}

/**
 * Return the indices of a longest common subsequence, in one text and in the other.
 *
 * Lengths are tabled from the end, so that the walk from the start needs no reversal. Time and
 * space are the product of the two lengths, less what both begin and end with.
 * @param {readonly string[]} one @param {readonly string[]} other
 * @returns {[Set<number>, Set<number>]}
 */
function common(one, other) {
  const inOne = new Set(/** @type {number[]} */ ([]));
  const inOther = new Set(/** @type {number[]} */ ([]));
  /** @param {number} i @param {number} j */
  const match = (i, j) => {
    inOne.add(i);
    inOther.add(j);
  };
  let begin = 0;
  while (begin < one.length && begin < other.length && one[begin] === other[begin]) {
    match(begin, begin);
    begin++;
  }
  let end = one.length;
  let otherEnd = other.length;
  while (end > begin && otherEnd > begin && one[end - 1] === other[otherEnd - 1]) {
    match(--end, --otherEnd);
  }
  const rows = end - begin;
  const columns = otherEnd - begin;
  const length = Array.from({ length: rows + 1 }, () => new Uint32Array(columns + 1));
  for (let i = rows - 1; i >= 0; i--) {
    for (let j = columns - 1; j >= 0; j--) {
      length[i][j] =
        one[begin + i] === other[begin + j]
          ? length[i + 1][j + 1] + 1
          : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < columns; ) {
    if (one[begin + i] === other[begin + j]) match(begin + i++, begin + j++);
    else if (length[i + 1][j] >= length[i][j + 1]) i++;
    else j++;
  }
  return [inOne, inOther];
}

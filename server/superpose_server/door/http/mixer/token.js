/**
 * The token that calls carry to a server that asks for one. It is kept for this tab, so that a reload
 * does not ask again; never in a cookie, nor in an address, which would be logged on the way.
 */

const KEY = "superpose-token";

/** @returns {string} The token; "": none. */
export const token = () => sessionStorage.getItem(KEY) ?? "";

/** @param {string} token */
export const keepToken = (token) => sessionStorage.setItem(KEY, token);

// Types of what the page uses of htm-preact.js; this file is ours. Markup is not typed.
export function html(strings: TemplateStringsArray, ...values: unknown[]): any;
export function render(markup: any, parent: Element): void;

type Change<S> = S | ((before: S) => S);
export function useState<S>(initial: S | (() => S)): [S, (change: Change<S>) => void];
export function useReducer<S, A>(reduce: (state: S, action: A) => S, initial: S): [S, (action: A) => void];
export function useEffect(effect: () => void | (() => void), inputs?: readonly unknown[]): void;
export function useMemo<T>(make: () => T, inputs: readonly unknown[]): T;
export function useRef<T>(initial: T): { current: T };

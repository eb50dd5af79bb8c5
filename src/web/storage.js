// Browser storage that may be full or blocked: the page then forgets between visits, and works.

/** A name as the browser has it. */
export const keyOf = (name) => `gantry.${name}`;

function wrap(area) {
  return {
    read(key, otherwise = null) {
      try {
        const text = area().getItem(keyOf(key));
        return text === null ? otherwise : JSON.parse(text);
      } catch {
        return otherwise;
      }
    },
    write(key, value) {
      try {
        area().setItem(keyOf(key), JSON.stringify(value));
      } catch {
        // Full or blocked.
      }
    },
    remove(key) {
      try {
        area().removeItem(keyOf(key));
      } catch {
        // Blocked.
      }
    },
  };
}

/** Kept between visits. */
export const remembered = wrap(() => localStorage);
/** Kept for this tab, over reloads. */
export const tabMemory = wrap(() => sessionStorage);

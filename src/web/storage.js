// Browser storage that may be full or blocked: the page then forgets between visits, and works.

function wrap(area) {
  return {
    read(key, otherwise = null) {
      try {
        const text = area().getItem(`gantry.${key}`);
        return text === null ? otherwise : JSON.parse(text);
      } catch {
        return otherwise;
      }
    },
    write(key, value) {
      try {
        area().setItem(`gantry.${key}`, JSON.stringify(value));
      } catch {
        // Full or blocked.
      }
    },
    remove(key) {
      try {
        area().removeItem(`gantry.${key}`);
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

// @ts-check
/**
 * The page that a runner lives in: whether it is seen, and whether it was left.
 *
 * Python has no such module: a process is not hidden, and it does not come back.
 * @module
 */

/** Follow one page. */
export class Page {
  /** @param {any} window as in System */
  constructor(window) {
    // It may never come back.
    this.isLeft = false;
    this._window = window;
    // Nothing of the page is of interest any more.
    this._ended = new AbortController();
    /** @type {(type: string) => void} */
    this._listener = () => {};
    // Some browsers know it: wifi, cellular and the like.
    this._network = this._networkInformation()?.type;
  }

  get isHidden() {
    return this._window.document?.visibilityState === "hidden";
  }

  /**
   * Begin to call a function with the type of each event, once this object knows of it.
   * @param {(type: string) => void} listener
   */
  watch(listener) {
    this._listener = listener;
    const { signal } = this._ended;
    for (const event of ["online", "pageshow", "pagehide"]) {
      this._window.addEventListener?.(event, this._notice, { signal });
    }
    this._window.document?.addEventListener("visibilitychange", this._notice, { signal });
    this._networkInformation()?.addEventListener?.("change", this._noticeNetwork, { signal });
  }

  /** Watch no longer. */
  end() {
    this._ended.abort();
  }

  /** @param {{type: string}} event */
  _notice = ({ type }) => {
    if (type === "pagehide") this.isLeft = true;
    if (type === "pageshow") this.isLeft = false;
    this._listener(type);
  };

  // A change may be one of speed as well.
  _noticeNetwork = () => {
    const former = this._network;
    this._network = this._networkInformation()?.type;
    if (this._network !== former) this._listener("networkchange");
  };

  _networkInformation() {
    return this._window.navigator?.connection;
  }
}

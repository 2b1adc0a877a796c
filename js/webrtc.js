// @ts-check
/**
 * WebRTC by RTCPeerConnection. It closes a connection only when the machine says so.
 * @module
 */

import { NotConnectedError } from "./errors.js";
import { shown } from "./shown.js";
import { browserSystem } from "./system.js";

/** @import { Bytes } from "./encoding.js" */
/** @import { Sdp } from "./messages.js" */
/** @import { System } from "./system.js" */

const CHANNEL_LABEL = "connectoid";
// How long candidates are gathered. What a STUN server has not answered by then is left out.
const GATHER_LIMIT_S = 2;
// The same where no server is asked: a slow machine is busy with its own addresses, and an offer
// without them is waited for in vain for AGAIN_AFTER_OFFER_S.
const GATHER_OWN_LIMIT_S = 20;
// How much may be buffered on a data channel. More waits.
const MAX_BUFFERED_BYTES = 1_048_576;
// For what was sent to arrive, when a connection is closed.
const FLUSH_S = 5;
// Once the network has changed: browsers miss the other end within a few seconds.
const DOUBT_S = 15;
// How long the other end may be missed. Browsers say so after five seconds, and give up after
// thirty, as they ask for so long at the old address. No browser for desktops tells a page that the
// network is another one, so a page has to take that for the reason.
const MISSED_S = 3;

// A TURN server's error (RFC 8489, section 14.8).
const UNAUTHORIZED = 401;

export const CLOSED = "The connection is closed.";

/**
 * Reports are (contact, event, attemptId, value). The events are `gathered` with an offer, an
 * answer or null, `opened`, `message` with bytes or a string, `trouble` with what a server
 * refuses, in words, `silent` when the other end has not answered for a while, `refused` when
 * something came that no honest app sends, and `closed`.
 * @typedef {(contact: number, event: string, attemptId: number, value?: any) => void} Report
 *
 * An adapter makes peer connections: one for each contact, that of the newest attempt. `write`
 * resolves when there is room for more, and rejects with NotConnectedError.
 * @typedef {object} WebRTC
 * @property {(report: Report) => void} start
 * @property {(
 *   contact: number, attemptId: number, offer: Sdp | null, ice: Promise<RTCConfiguration>,
 * ) => void} gather
 * @property {(contact: number, attemptId: number, answer: Sdp) => void} join
 * @property {(contact: number, attemptId: number, message: Bytes | string) => Promise<void>} write
 * @property {(contact: number, attemptId: number) => void} close
 * @property {() => void} doubt reports connections as closed whose other ends do not answer now:
 *   the network of this device is another one
 * @property {() => void} stop
 */

/** The peer connection of one attempt. */
class Peer {
  /**
   * @param {number} attemptId
   * @param {(event: string, value?: any) => void} report
   * @param {System["sleep"]} sleep
   */
  constructor(attemptId, report, sleep) {
    this.attemptId = attemptId;
    this.isClosed = false;
    // Whether the other end broke the rules: it is owed nothing more.
    this._isRefused = false;
    /** @type {RTCPeerConnection | undefined} */
    this.connection = undefined;
    /** @type {RTCDataChannel | undefined} */
    this.channel = undefined;
    this._report = report;
    this._sleep = sleep;
    this._isDoubted = false;
    // Aborted when the other end answers again.
    this._missed = new AbortController();
    // Calls for those who wait for room.
    /** @type {(() => void)[]} */
    this._waiting = [];
  }

  /**
   * Report an event, as long as the peer is not closed.
   * @param {string} event
   * @param {any} [value]
   */
  tell(event, value) {
    if (!this.isClosed) this._report(event, value);
  }

  /**
   * Make an offer, or the answer to one, with its candidates.
   * @param {RTCPeerConnection} connection
   * @param {Sdp | null} offer
   * @param {number} limitS
   */
  async describe(connection, offer, limitS) {
    this.connection = connection;
    connection.onconnectionstatechange = () => this._judge();
    connection.onicecandidateerror = ({ url, errorCode }) => {
      if (errorCode !== UNAUTHORIZED) return;
      this.tell("trouble", `${url} cannot be used: it refuses the username or the password.`);
    };
    connection.ondatachannel = ({ channel }) => this.watch(channel);
    if (offer) {
      await connection.setRemoteDescription(offer);
    } else {
      this.watch(connection.createDataChannel(CHANNEL_LABEL));
    }
    // With an offer this makes an answer.
    await connection.setLocalDescription();
    await Promise.race([allGathered(connection), this._sleep(limitS)]);
  }

  /** For a while, take a connection for lost as soon as the browser misses its other end. */
  async doubt() {
    this._isDoubted = true;
    this._judge();
    await this._sleep(DOUBT_S);
    this._isDoubted = false;
  }

  /** Tell what the browser says of the connection. One that never opened gets the same time. */
  _judge() {
    this._missed.abort();
    const state = this.connection?.connectionState;
    // The browser has asked whether the other is there (RFC 7675), and asks on.
    if (state === "disconnected") this._miss();
    else if (this.channel && ["failed", "closed"].includes(state ?? "")) this.tell("closed");
  }

  /** Wait for the other end to answer again, and no longer than that may take. */
  async _miss() {
    const { signal } = this._missed = new AbortController();
    if (!this._isDoubted) {
      this.tell("silent");
      await this._sleep(MISSED_S, signal);
    }
    if (signal.aborted || !this.channel) return;
    this.tell("closed");
    // It would go on by itself, and the other end would take it for one that is there.
    this.end();
  }

  /** @param {RTCDataChannel} channel */
  watch(channel) {
    if (this.channel || !isOurs(channel)) {
      this._isRefused = true;
      this.tell("refused");
      return;
    }
    this.channel = channel;
    channel.binaryType = "arraybuffer";
    channel.bufferedAmountLowThreshold = MAX_BUFFERED_BYTES / 2;
    channel.onmessage = ({ data }) => this.tell("message", asMessage(data));
    channel.onclose = () => this._channelEnds();
    // The other end takes part in it, when it likes.
    channel.onclosing = () => this._channelEnds();
    channel.onbufferedamountlow = () => this._goOn();
    channel.onopen = () => this.tell("opened");
    if (channel.readyState === "open") this.tell("opened");
  }

  /**
   * Send, and resolve when there is room for more; throw NotConnectedError.
   * @param {Bytes | string} message
   */
  async send(message) {
    const { channel } = this;
    if (channel?.readyState !== "open") throw new NotConnectedError(CLOSED);
    try {
      channel.send(/** @type {any} */ (message));
    } catch {
      // A channel that loses a message is of no use. To close it takes the other end.
      this.tell("closed");
      throw new NotConnectedError(CLOSED);
    }
    if (channel.bufferedAmount <= MAX_BUFFERED_BYTES) return;
    await new Promise((resolve) => this._waiting.push(() => resolve(null)));
    if (channel.readyState !== "open") throw new NotConnectedError(CLOSED);
  }

  _channelEnds() {
    this.tell("closed");
    this._goOn();
  }

  /** Let those go on who wait for room. */
  _goOn() {
    for (const goOn of this._waiting.splice(0)) goOn();
  }

  /**
   * Close it, once what was sent has arrived.
   *
   * A connection that is closed at once takes with it what was lost on the way: the last message
   * may be the one that proves to the other side that it is connected.
   */
  async close() {
    this.isClosed = true;
    if (this.channel?.readyState === "open" && !this._isRefused) {
      const closed = isClosed(this.channel);
      this.channel.close();
      await Promise.race([closed, this._sleep(FLUSH_S)]);
    }
    this.end();
  }

  /** Close it at once. */
  end() {
    this.isClosed = true;
    this._missed.abort();
    this.connection?.close();
    // A browser may tell nobody of a channel that ends so.
    this._goOn();
  }
}

/**
 * Return whether a channel is as CHANNEL-1 says.
 * @param {RTCDataChannel} channel
 */
function isOurs(channel) {
  const isReliable = channel.maxRetransmits === null && channel.maxPacketLifeTime === null;
  return channel.label === CHANNEL_LABEL && channel.ordered && isReliable;
}

/** Make peer connections with RTCPeerConnection. @implements {WebRTC} */
export class PeerAdapter {
  /**
   * @param {typeof RTCPeerConnection} [PeerConnection]
   * @param {System["sleep"]} [sleep]
   */
  constructor(PeerConnection = globalThis.RTCPeerConnection, sleep = browserSystem().sleep) {
    this._PeerConnection = PeerConnection;
    this._sleep = sleep;
    /** @type {Map<number, Peer>} */
    this._peers = new Map();
    /** @type {Report} */
    this._report = () => {};
  }

  /** @type {WebRTC["start"]} */
  start(report) {
    this._report = report;
  }

  /** @type {WebRTC["gather"]} */
  async gather(contact, attemptId, offer, ice) {
    this._drop(contact);
    const peer = new Peer(attemptId, (event, value) => {
      this._report(contact, event, attemptId, value);
    }, this._sleep);
    this._peers.set(contact, peer);
    await this._describe(peer, offer, ice).catch(warn);
    const local = peer.connection?.localDescription;
    const sdp = local ? { type: local.type, sdp: local.sdp } : null;
    peer.tell("gathered", sdp);
  }

  /** @type {WebRTC["join"]} */
  join(contact, attemptId, answer) {
    this._of(contact, attemptId)?.connection?.setRemoteDescription(answer).catch(warn);
  }

  /** @type {WebRTC["write"]} */
  async write(contact, attemptId, message) {
    const peer = this._of(contact, attemptId);
    if (!peer) throw new NotConnectedError(CLOSED);
    await peer.send(message);
  }

  /** @type {WebRTC["close"]} */
  close(contact, attemptId) {
    if (this._of(contact, attemptId)) this._drop(contact);
  }

  doubt() {
    for (const peer of this._peers.values()) peer.doubt();
  }

  // A page that is left has no time.
  stop() {
    for (const peer of this._peers.values()) peer.end();
    this._peers.clear();
  }

  /**
   * @param {Peer} peer
   * @param {Sdp | null} offer
   * @param {Promise<RTCConfiguration>} ice
   */
  async _describe(peer, offer, ice) {
    const configuration = await ice;
    if (peer.isClosed) return;
    const { connection, refused } = connectionWith(this._PeerConnection, configuration);
    for (const url of refused) {
      peer.tell("trouble", `${shown(hostIn(url))} cannot be used: this browser refuses it.`);
    }
    const limitS = configuration.iceServers?.length ? GATHER_LIMIT_S : GATHER_OWN_LIMIT_S;
    await peer.describe(connection, offer, limitS);
  }

  /**
   * @param {number} contact
   * @param {number} attemptId
   */
  _of(contact, attemptId) {
    const peer = this._peers.get(contact);
    return peer?.attemptId === attemptId ? peer : undefined;
  }

  /** @param {number} contact */
  _drop(contact) {
    const peer = this._peers.get(contact);
    this._peers.delete(contact);
    peer?.close();
  }
}

/**
 * Return a connection with all servers that the browser takes, and the URLs that it refuses.
 *
 * A browser makes no connection at all with a list that has a bad server in it.
 * @param {typeof RTCPeerConnection} PeerConnection
 * @param {RTCConfiguration} configuration
 * @returns {{connection: RTCPeerConnection, refused: string[]}}
 */
function connectionWith(PeerConnection, configuration) {
  try {
    return { connection: new PeerConnection(configuration), refused: [] };
  } catch {
    const single = (configuration.iceServers ?? []).flatMap((server) => (
      [server.urls].flat().map((urls) => ({ ...server, urls }))));
    const iceServers = single.filter((server) => isTaken(PeerConnection, server));
    const refused = single.filter((server) => !iceServers.includes(server));
    const connection = new PeerConnection({ ...configuration, iceServers });
    return { connection, refused: refused.map(({ urls }) => urls) };
  }
}

/**
 * @param {typeof RTCPeerConnection} PeerConnection
 * @param {RTCIceServer} server
 */
function isTaken(PeerConnection, server) {
  try {
    new PeerConnection({ iceServers: [server] }).close();
    return true;
  } catch {
    return false;
  }
}

/**
 * Return what may be shown of the URL of a server: what stands before an `@` is a secret.
 * @param {string} url
 */
function hostIn(url) {
  return url.slice(url.lastIndexOf("@") + 1);
}

/** @param {RTCPeerConnection} connection */
export function allGathered(connection) {
  return new Promise((resolve) => {
    const look = () => connection.iceGatheringState === "complete" && resolve(null);
    connection.onicegatheringstatechange = look;
    look();
  });
}

/**
 * Resolve when the other end has all that was sent, and the channel is closed.
 * @param {RTCDataChannel} channel
 */
function isClosed(channel) {
  return new Promise((resolve) => {
    channel.addEventListener("close", resolve, { once: true });
  });
}

/** @param {string | ArrayBuffer} data */
function asMessage(data) {
  return typeof data === "string" ? data : new Uint8Array(data);
}

/** @param {unknown} error */
function warn(error) {
  console.warn("WebRTC failed:", error);
}

// -- Where there is no WebRTC ------------------------------------------------------------

export const LACKS_WEBRTC =
  "WebRTC is missing or off here: contacts can be seen and ended, but not connected.";

/** Make no connections. @type {WebRTC} */
export const NO_WEBRTC = {
  start() {},
  gather() {},
  join() {},
  write: () => Promise.reject(new NotConnectedError(LACKS_WEBRTC)),
  close() {},
  doubt() {},
  stop() {},
};

// @ts-check
/**
 * Effects that leave the page are carried out here: to relays, to WebRTC, and to the app.
 * @module
 */

import { Channel } from "./channel.js";
import { ConnectoidError } from "./errors.js";
import { hasTurn, iceServers } from "./ice.js";

/** @import { Host as ChannelHost } from "./channel.js" */
/** @import { Complaints } from "./complaints.js" */
/** @import { Contact } from "./contact/contact.js" */
/** @import { Effect, Send } from "./contact/effects.js" */
/** @import { Lines } from "./line.js" */
/** @import { Entry, Roster } from "./roster.js" */
/** @import { Sender } from "./sender.js" */
/** @import { System } from "./system.js" */
/** @import { TurnServer } from "./turn.js" */
/** @import { WebRTC } from "./webrtc.js" */

/**
 * The part of the runner that carrying out needs.
 * @typedef {object} OwnHost
 * @property {System} system
 * @property {Roster} roster
 * @property {Complaints} complaints
 * @property {WebRTC} webrtc
 *
 * @typedef {OwnHost & ChannelHost} Host
 *
 * @typedef {(name: string, event: string) => void} OnEvent
 */

/** Carry out effects. */
export class Carrier {
  /**
   * @param {Host} host
   * @param {Sender} sender
   * @param {Sender} toStrangers
   * @param {Lines} lines
   * @param {RTCIceServer[]} iceServers
   * @param {OnEvent} onEvent
   */
  constructor(host, sender, toStrangers, lines, iceServers, onEvent) {
    this._host = host;
    this._sender = sender;
    this._toStrangers = toStrangers;
    this._lines = lines;
    this._iceServers = iceServers;
    this._onEvent = onEvent;
  }

  /**
   * Carry out one effect; one that fails is dropped, as if it had been lost on its way.
   * @param {number} number
   * @param {Entry} entry
   * @param {Effect} effect
   */
  carryOut(number, entry, effect) {
    try {
      this._carryOutNow(number, entry, effect);
    } catch (error) {
      this._host.complaints.make(
        new ConnectoidError(`"${effect.do}" for contact ${number} failed: ${error}`));
    }
  }

  /**
   * @param {number} number
   * @param {Entry} entry
   * @param {Effect} effect
   */
  _carryOutNow(number, entry, effect) {
    const { webrtc } = this._host;
    switch (effect.do) {
      case "send":
        this._senderFor(effect).send(number, effect.mailbox, effect.data, effect.hash);
        break;
      case "gather":
        webrtc.gather(number, effect.attemptId, effect.offer, this._ice(number, entry.contact));
        entry.channel?.take(null);
        break;
      case "join":
        webrtc.join(number, effect.attemptId, effect.answer);
        break;
      case "write":
        // A closed channel reports its end.
        webrtc.write(number, effect.attemptId, effect.octets).catch(() => {});
        break;
      case "close":
        webrtc.close(number, effect.attemptId);
        entry.channel?.take(null);
        break;
      case "tell":
        this._tell(number, entry, effect.event);
        break;
    }
  }

  /** @param {Send} effect */
  _senderFor({ isToStranger }) {
    return isToStranger ? this._toStrangers : this._sender;
  }

  /**
   * Return the servers for a contact. By relay alone no STUN server is asked.
   * @param {number} number
   * @param {Contact} contact
   * @returns {Promise<RTCConfiguration>}
   */
  async _ice(number, { record }) {
    const lines = await this._lines.learned(number, record);
    const { relayOnly } = this._host.roster.privacy;
    /** @type {Set<string>} */
    const withStun = new Set();
    /** @type {Map<string, TurnServer>} */
    const lent = new Map();
    for (const line of lines) {
      const server = line.lent(number);
      if (server) lent.set(line.url, server);
      if (line.hasStun && !relayOnly) withStun.add(line.url);
    }
    const servers = iceServers(record, withStun, lent, this._iceServers);
    if (!relayOnly) return { iceServers: servers };
    if (!hasTurn(servers)) {
      this._host.complaints.make(new ConnectoidError(lacksTurn(record.name)), number);
    }
    return { iceServers: servers, iceTransportPolicy: "relay" };
  }

  /**
   * @param {number} number
   * @param {Entry} entry
   * @param {string} event
   */
  _tell(number, entry, event) {
    if (event === "connected") {
      entry.channel = new Channel(this._host, number, entry.contact.attempt.attemptId);
    }
    if (event === "disconnected") entry.channel?.take(null);
    queueMicrotask(() => this._onEvent(entry.name, event));
  }
}

/** @param {string} name */
function lacksTurn(name) {
  return `${name}: connections by relay alone need a TURN server, yours or one that your relay`
    + " lends.";
}

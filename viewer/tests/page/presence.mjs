// Tests presence.js in the browser.
import assert from "node:assert/strict";

const inPage = async (world, script) => (await world.open()).page.evaluate(script);

export const tests = {
  async "presence behaves like a map when objects come and go"(world) {
    const wrong = await inPage(world, async () => {
      const { Presence, ONLINE } = await import("/page/presence.js");
      const presence = new Presence();
      const map = new Map();
      let seed = 1;
      const random = (below) => {
        seed = (seed * 16807) % 2147483647;
        return seed % below;
      };
      for (let step = 1; step <= 30_000; step++) {
        // Few ids, then many, then few: the field grows, reuses slots and is compacted.
        const id = String(random(step < 10_000 ? 300 : step < 20_000 ? 9000 : 30));
        const some = [...map.keys()][random(map.size || 1)];
        if (step % 5000 === 0) {
          for (const left of [...map.keys()].filter(() => random(10) === 0)) map.delete(left);
          presence.replace([...map].map(([id, at]) => ({ id, at })));
        } else if (random(5) < (step < 20_000 ? 3 : 1)) {
          presence.markSeen([{ id, at: step }], step);
          map.set(id, step);
        } else if (some !== undefined) {
          presence.markGone([{ id: some, at: map.get(some) }], step, step + 30_000);
          map.delete(some);
        }
        if (step % 100) continue;
        const kept = new Map();
        for (let slot = 0; slot < presence.slots; slot++) {
          if (presence.state[slot] === ONLINE) kept.set(presence.idAt(slot), presence.seenAt[slot]);
        }
        const same = kept.size === map.size && [...map].every(([id, at]) => kept.get(id) === at && presence.slotOf(id) >= 0);
        if (!same || presence.online !== map.size) return `step ${step}: ${kept.size} and ${presence.online} instead of ${map.size}`;
        if (presence.slots > 2 * map.size + 200) return `step ${step}: ${presence.slots} slots for ${map.size}`;
      }
      return "";
    });
    assert.equal(wrong, "");
  },

  async "a returning object gets its old cell and no other moves"(world) {
    const [before, after, newSlot] = await inPage(world, async () => {
      const { Presence } = await import("/page/presence.js");
      const presence = new Presence();
      const ids = Array.from({ length: 50 }, (_, id) => String(id));
      const slots = () => ids.map((id) => presence.slotOf(id));
      presence.markSeen(ids.map((id) => ({ id, at: 1 })), 1);
      const before = slots();
      presence.markGone([{ id: "7", at: 1 }, { id: "9", at: 1 }], 2, 2);
      presence.markSeen([{ id: "500", at: 3 }, { id: "9", at: 3 }, { id: "7", at: 3 }], 3);
      return [before, slots(), presence.slotOf("500")];
    });
    assert.deepEqual(after, before);
    assert.ok(!before.includes(newSlot));
  },

  async "presence keeps at most 20,000 objects and reuses free slots"(world) {
    const [kept, isReused] = await inPage(world, async () => {
      const { Presence } = await import("/page/presence.js");
      const presence = new Presence();
      presence.replace(Array.from({ length: 25_000 }, (_, id) => ({ id: String(id), at: 1 })));
      const kept = presence.online;
      presence.markGone([{ id: "5", at: 1 }], 2, 2);
      presence.markSeen([{ id: "24999", at: 3 }], 3);
      return [kept, presence.slotOf("24999") >= 0 && presence.online === kept];
    });
    assert.equal(kept, 20_000);
    assert.ok(isReused);
  },

  async "the lifetime is learnt from the ages at which objects go"(world) {
    const lifetimes = await inPage(world, async () => {
      const { Presence } = await import("/page/presence.js");
      const presence = new Presence();
      const lifetimes = [presence.lifetimeMs];
      for (const age of [3100, 5900, 4000, 3500, 600_000, 3200]) {
        presence.markSeen([{ id: "1", at: 0 }], 1);
        presence.markGone([{ id: "1", at: 0 }], 1, age);
      }
      return [...lifetimes, presence.lifetimeMs];
    });
    assert.deepEqual(lifetimes, [30_000, 3000]);
  },
};

// Who is online, as the page keeps it: presence.js, run where it belongs.
import assert from "node:assert/strict";

const inPage = async (world, what) => (await world.open()).page.evaluate(what);

export const tests = {
  async "who comes, goes and comes back is kept as a map would keep it"(world) {
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
        // Few, then many, then few: it grows, takes slots again and is pulled together.
        const id = String(random(step < 10_000 ? 300 : step < 20_000 ? 9000 : 30));
        const some = [...map.keys()][random(map.size || 1)];
        if (step % 5000 === 0) {
          for (const left of [...map.keys()].filter(() => random(10) === 0)) map.delete(left);
          presence.replace([...map].map(([id, at]) => ({ id, at })));
        } else if (random(5) < (step < 20_000 ? 3 : 1)) {
          presence.see([{ id, at: step }], step);
          map.set(id, step);
        } else if (some !== undefined) {
          presence.remove([{ id: some, at: map.get(some) }], step, step + 30_000);
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

  async "an object that comes back has its cell again, and nobody else is moved"(world) {
    const [before, after, others] = await inPage(world, async () => {
      const { Presence } = await import("/page/presence.js");
      const presence = new Presence();
      const ids = Array.from({ length: 50 }, (_, id) => String(id));
      const slots = () => ids.map((id) => presence.slotOf(id));
      presence.see(ids.map((id) => ({ id, at: 1 })), 1);
      const before = slots();
      presence.remove([{ id: "7", at: 1 }, { id: "9", at: 1 }], 2, 2);
      presence.see([{ id: "500", at: 3 }, { id: "9", at: 3 }, { id: "7", at: 3 }], 3);
      return [before, slots(), presence.slotOf("500")];
    });
    assert.deepEqual(after, before);
    assert.ok(!before.includes(others));
  },

  async "of more than 20,000 objects it keeps 20,000, and others as soon as there is room"(world) {
    const [most, room] = await inPage(world, async () => {
      const { Presence } = await import("/page/presence.js");
      const presence = new Presence();
      presence.replace(Array.from({ length: 25_000 }, (_, id) => ({ id: String(id), at: 1 })));
      const most = presence.online;
      presence.remove([{ id: "5", at: 1 }], 2, 2);
      presence.see([{ id: "24999", at: 3 }], 3);
      return [most, presence.slotOf("24999") >= 0 && presence.online === most];
    });
    assert.equal(most, 20_000);
    assert.ok(room);
  },

  async "what a fade ends at is learnt from the ages at which objects go"(world) {
    const spans = await inPage(world, async () => {
      const { Presence } = await import("/page/presence.js");
      const presence = new Presence();
      const spans = [presence.span];
      for (const age of [3100, 5900, 4000, 3500, 600_000, 3200]) {
        presence.see([{ id: "1", at: 0 }], 1);
        presence.remove([{ id: "1", at: 0 }], 1, age);
      }
      return [...spans, presence.span];
    });
    assert.deepEqual(spans, [30_000, 3000]);
  },
};

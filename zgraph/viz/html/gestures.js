// Fingers and the mouse: dragging, pinching with two fingers, and presses that do not move, which are clicks.

const SLOP = { mouse: 3, touch: 12, pen: 6 };

// moved(dx, dy), clicked(down), pinched(factor, x, y, dx, dy) about a point of the target.
function onDrag(target, moved, clicked, pinched) {
  const held = new Map();
  let down, far;
  const move = event => {
    if (!held.has(event.pointerId)) return;
    const [before, other] = [held.get(event.pointerId), [...held].find(([id]) => id !== event.pointerId)?.[1]];
    const after = { x: event.clientX, y: event.clientY }, [dx, dy] = [after.x - before.x, after.y - before.y];
    held.set(event.pointerId, after);
    far += Math.abs(dx) + Math.abs(dy);
    if (other) {
      const { left, top } = target.getBoundingClientRect(), wide = Math.max(10, distance(before, other));
      pinched(Math.max(10, distance(after, other)) / wide, (after.x + other.x) / 2 - left, (after.y + other.y) / 2 - top, dx / 2, dy / 2);
    } else if (far > (SLOP[event.pointerType] ?? 3)) moved(dx, dy);
  };
  const up = event => {
    if (!held.delete(event.pointerId)) return;
    if (!held.size) {
      for (const [name, act] of Object.entries(listeners)) window.removeEventListener(name, act);
      if (event.type === "pointerup" && far <= (SLOP[event.pointerType] ?? 3)) clicked(down);
    }
  };
  const listeners = { pointermove: move, pointerup: up, pointercancel: up };
  target.addEventListener("pointerdown", event => {
    if (event.button) return;
    if (!held.size) {
      [down, far] = [event, 0];
      for (const [name, act] of Object.entries(listeners)) window.addEventListener(name, act);
    } else far = Infinity;
    held.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
}

const distance = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);

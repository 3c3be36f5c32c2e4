//! Maintenance: until a given time, objects that are not seen are excused.

use crate::definition::{Run, Window, index};
use crate::tree::{GroupIndex, ObjectIndex, Tree};

impl Tree {
    /// When the next maintenance window ends, in microseconds since 1970.
    #[must_use]
    pub fn next_maintenance_end(&self) -> Option<u64> {
        self.definition.maintenance.get(self.ended_windows).map(|window| window.until_micros)
    }

    /// Ends the maintenance windows that end at or before `now`, in microseconds since 1970, and
    /// updates the groups of their objects. Appends the groups whose status changed, perhaps
    /// repeatedly.
    pub fn end_maintenance(&mut self, now_micros: u64, changed: &mut Vec<GroupIndex>) {
        while let Some(&window) = self.definition.maintenance.get(self.ended_windows)
            && window.until_micros <= now_micros
        {
            self.ended_windows += 1;
            for object in window.run.objects() {
                let object = ObjectIndex(index(object));
                let was = self.kind(object);
                self.in_maintenance[object.position()] = false;
                self.reclassify(object, was, changed);
            }
        }
    }

    pub(crate) fn open_maintenance(&mut self) {
        self.ended_windows = 0;
        for window in &self.definition.maintenance {
            self.in_maintenance[window.run.objects()].fill(true);
        }
    }
}

/// Collects for each object how long it is in maintenance, and merges overlapping windows.
pub(crate) struct Windows {
    until_micros: Vec<u64>,
}

impl Windows {
    pub(crate) fn new(objects: usize) -> Self {
        Self { until_micros: vec![0; objects] }
    }

    pub(crate) fn extend(&mut self, object: usize, until_micros: u64) {
        self.until_micros[object] = self.until_micros[object].max(until_micros);
    }

    pub(crate) fn finish(self) -> Vec<Window> {
        let mut windows = Vec::<Window>::new();
        for (object, until_micros) in self.until_micros.into_iter().enumerate() {
            match windows.last_mut() {
                Some(last)
                    if last.until_micros == until_micros && last.run.objects().end == object =>
                {
                    last.run.count += 1;
                }
                _ if until_micros == 0 => {}
                _ => windows
                    .push(Window { until_micros, run: Run { first: index(object), count: 1 } }),
            }
        }
        windows.sort_by_key(|window| window.until_micros);
        windows
    }
}

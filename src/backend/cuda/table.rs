//! A table of jobs in the making, and its image in a GPU's memory.

use std::collections::HashMap;

use bytemuck::bytes_of;

use super::jobs::{self, Evaluation, Form, Header, Job, Op, Operand, Segment};

/// Addresses of scratch memory before it is known where it will lie: from here on.
pub const SCRATCH: u64 = 1 << 60;

/// Jobs of one launch: none may read what another writes.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub jobs: Vec<Job>,
    pub forms: Vec<Form>,
    pub evaluations: Vec<Evaluation>,
    pub segments: Vec<Segment>,
    pub operands: Vec<Operand>,
    pub ops: Vec<Op>,
    known_forms: HashMap<Form, u32>,
    known_ops: HashMap<Vec<Op>, u32>,
}

impl Table {
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// True if a job needs shared memory for its values.
    pub fn has_evaluations(&self) -> bool {
        !self.evaluations.is_empty()
    }

    pub fn form(&mut self, form: Form) -> u32 {
        let next = self.forms.len() as u32;
        let known = *self.known_forms.entry(form).or_insert(next);
        if known == next {
            self.forms.push(form);
        }
        known
    }

    /// Index of the first of some operations.
    pub fn ops(&mut self, ops: &[Op]) -> u32 {
        if let Some(known) = self.known_ops.get(ops) {
            return *known;
        }
        let first = self.ops.len() as u32;
        self.ops.extend(ops);
        self.known_ops.insert(ops.to_vec(), first);
        first
    }

    /// Adds a box whose segments were pushed since `first_segment`.
    pub fn push_evaluation(&mut self, mut b: Evaluation, first_segment: usize) {
        b.segments = first_segment as u32;
        b.segment_count = (self.segments.len() - first_segment) as u32;
        let form = Form { kind: jobs::EVALUATE, unit: b.unit, ..Form::default() };
        let form = self.form(form);
        let src = self.evaluations.len() as u64;
        self.evaluations.push(b);
        self.jobs.push(Job { src, form, rows: b.rows, cols: b.cols, ..Job::default() });
    }

    /// Puts scratch memory at an address.
    pub fn bind_scratch(&mut self, base: u64) {
        let bind = |address: &mut u64| {
            if *address >= SCRATCH {
                *address = *address - SCRATCH + base;
            }
        };
        let kinds: Vec<u8> = self.forms.iter().map(|f| f.kind).collect();
        for job in &mut self.jobs {
            if kinds[job.form as usize] != jobs::EVALUATE {
                bind(&mut job.src);
                bind(&mut job.dst);
                bind(&mut job.aux);
            }
        }
        for b in &mut self.evaluations {
            bind(&mut b.dst);
            bind(&mut b.scale);
        }
        self.operands.iter_mut().for_each(|o| bind(&mut o.address));
    }

    /// Bytes of the image.
    pub fn bytes(&self) -> u64 {
        self.lay_out(0).1
    }

    /// The header for a place in memory, and where the image ends.
    fn lay_out(&self, base: u64) -> (Header, u64) {
        let mut at = size_of::<Header>().next_multiple_of(64) as u64;
        let mut part = |bytes: usize| {
            let start = base + at;
            at += (bytes as u64).next_multiple_of(64);
            start
        };
        let header = Header {
            jobs: part(size_of_val(&self.jobs[..])),
            forms: part(size_of_val(&self.forms[..])),
            evaluations: part(size_of_val(&self.evaluations[..])),
            segments: part(size_of_val(&self.segments[..])),
            operands: part(size_of_val(&self.operands[..])),
            ops: part(size_of_val(&self.ops[..])),
            count: self.jobs.len() as u32,
            pad: 0,
        };
        (header, at)
    }

    /// The image for a place in memory: header first.
    pub fn image(&self, base: u64) -> Vec<u8> {
        let (header, bytes) = self.lay_out(base);
        let mut image = vec![0; bytes as usize];
        let mut put = |at: u64, bytes: &[u8]| {
            let at = (at - base) as usize;
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(base, bytes_of(&header));
        put(header.jobs, bytemuck::cast_slice(&self.jobs));
        put(header.forms, bytemuck::cast_slice(&self.forms));
        put(header.evaluations, bytemuck::cast_slice(&self.evaluations));
        put(header.segments, bytemuck::cast_slice(&self.segments));
        put(header.operands, bytemuck::cast_slice(&self.operands));
        put(header.ops, bytemuck::cast_slice(&self.ops));
        image
    }
}

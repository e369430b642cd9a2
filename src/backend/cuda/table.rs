//! A table of jobs in the making, and its image in a GPU's memory.

use std::collections::HashMap;

use bytemuck::bytes_of;

use super::jobs::{self, Evaluation, Header, Job, Op, Operand, Segment};

/// Addresses of scratch memory before it is known where it will lie: from here on.
pub const SCRATCH: u64 = 1 << 60;

/// Bytes between the headers of an image.
const HEADER: u64 = size_of::<Header>().next_multiple_of(64) as u64;

/// Jobs that run side by side: none may read what another writes. Each kernel has its own.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Jobs of kind [`jobs::QUANTIZE`].
    pub quantizations: Vec<Job>,
    /// Those of kinds [`jobs::COPY`], [`jobs::SCAN`] and [`jobs::MAXIMUM`].
    pub copies: Vec<Job>,
    /// Those of kind [`jobs::EVALUATE`].
    pub evaluation_jobs: Vec<Job>,
    pub evaluations: Vec<Evaluation>,
    pub segments: Vec<Segment>,
    pub operands: Vec<Operand>,
    pub ops: Vec<Op>,
    known_ops: HashMap<Vec<Op>, u32>,
}

impl Table {
    pub fn is_empty(&self) -> bool {
        self.lists().iter().all(|jobs| jobs.is_empty())
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
        let src = self.evaluations.len() as u64;
        self.evaluations.push(b);
        let (kind, unit, rows, cols) = (jobs::EVALUATE, b.unit, b.rows, b.cols);
        self.evaluation_jobs.push(Job { src, kind, unit, rows, cols, ..Job::default() });
    }

    /// Puts scratch memory at an address.
    pub fn bind_scratch(&mut self, base: u64) {
        let bind = |address: &mut u64| {
            if *address >= SCRATCH {
                *address = *address - SCRATCH + base;
            }
        };
        for job in self.quantizations.iter_mut().chain(&mut self.copies) {
            bind(&mut job.src);
            bind(&mut job.dst);
            bind(&mut job.aux);
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

    /// The jobs of each kernel, in the order of an image's headers.
    pub fn lists(&self) -> [&[Job]; 3] {
        [&self.quantizations, &self.copies, &self.evaluation_jobs]
    }

    /// Where a kernel's header lies in an image at an address.
    pub fn header_at(address: u64, kernel: usize) -> u64 {
        address + kernel as u64 * HEADER
    }

    /// The headers for a place in memory, and where the image ends.
    fn lay_out(&self, base: u64) -> ([Header; 3], u64) {
        let mut at = 3 * HEADER;
        let mut part = |bytes: usize| {
            let start = base + at;
            at += (bytes as u64).next_multiple_of(64);
            start
        };
        let mut headers = self.lists().map(|jobs| Header {
            jobs: part(size_of_val(jobs)),
            count: jobs.len() as u32,
            ..Header::default()
        });
        headers[2] = Header {
            evaluations: part(size_of_val(&self.evaluations[..])),
            segments: part(size_of_val(&self.segments[..])),
            operands: part(size_of_val(&self.operands[..])),
            ops: part(size_of_val(&self.ops[..])),
            ..headers[2]
        };
        (headers, at)
    }

    /// The image for a place in memory: headers first.
    pub fn image(&self, base: u64) -> Vec<u8> {
        let (headers, bytes) = self.lay_out(base);
        let mut image = vec![0; bytes as usize];
        let mut put = |at: u64, bytes: &[u8]| {
            let at = (at - base) as usize;
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        for (kernel, (header, jobs)) in headers.iter().zip(self.lists()).enumerate() {
            put(Table::header_at(base, kernel), bytes_of(header));
            put(header.jobs, bytemuck::cast_slice(jobs));
        }
        let last = &headers[2];
        put(last.evaluations, bytemuck::cast_slice(&self.evaluations));
        put(last.segments, bytemuck::cast_slice(&self.segments));
        put(last.operands, bytemuck::cast_slice(&self.operands));
        put(last.ops, bytemuck::cast_slice(&self.ops));
        image
    }
}

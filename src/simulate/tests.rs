//! Schedules small enough to be timed by hand.

use super::*;

/// 1 GB/s NICs and 10 GB/s NVLinks without latency, so that a gigabyte takes a second.
fn cluster(gpus_per_host: u64, nics_per_host: u64) -> Cluster {
    Cluster { gpus_per_host, nics_per_host, nvlink_gb_s: 10.0, nic_gb_s: 1.0, latency_us: 0.0 }
}

const GB: u64 = 1_000_000_000;

fn message(from: Peer, to: u64, flow: u32, bytes: u64) -> Message {
    let hop = u32::from(matches!(from, Peer::Rank(_)));
    Message { hop, from, to: RankId(to), flows: vec![flow], bytes }
}

fn send(from: u32, to: u64, bytes: u64) -> Message {
    message(Peer::Trainer(from), to, 0, bytes)
}

fn relay(from: u64, to: u64, bytes: u64) -> Message {
    message(Peer::Rank(RankId(from)), to, 0, bytes)
}

fn traffic(trainers: u32, ranks: u32, in_flight: u64, buckets: Vec<Vec<Message>>) -> Traffic {
    Traffic {
        trainers,
        ranks,
        in_flight,
        staging_bytes: 0,
        buckets: buckets.len(),
        messages: Box::new(move |bucket| buckets[bucket].clone()),
        amax: Vec::new(),
        values: Values::default(),
    }
}

fn run(traffic: &Traffic, cluster: &Cluster) -> Report {
    simulate(traffic, cluster, &mut |_| ())
}

fn seconds(traffic: &Traffic, cluster: &Cluster) -> f64 {
    run(traffic, cluster).predicted_s
}

fn near(found: f64, wanted: f64) {
    assert!((found - wanted).abs() < 1e-9 * wanted.abs().max(1.0), "{found}, not {wanted}");
}

/// Bytes and seconds of the busiest link of a class.
fn busiest(report: &Report, class: &str) -> (u64, f64) {
    let found = report.links.iter().find(|l| l.class == class).unwrap();
    (found.busiest_bytes, found.busiest_s)
}

#[test]
fn one_host_uses_its_nvlinks() {
    let all = vec![send(0, 0, 10 * GB), send(0, 1, 10 * GB), send(1, 0, 5 * GB)];
    let report = run(&traffic(2, 2, 2, vec![all]), &cluster(4, 4));
    // Trainer 0 sends 20 GB; trainer 1's message waits for rank 0's link, not for trainer 0.
    near(report.predicted_s, 2.0);
    let classes: Vec<&str> = report.links.iter().map(|l| l.class).collect();
    assert_eq!(classes, ["nvlink out", "nvlink in"]);
    assert_eq!(busiest(&report, "nvlink out"), (20 * GB, 2.0));
    assert_eq!(busiest(&report, "nvlink in"), (15 * GB, 1.5));
    assert_eq!(report.bytes, Totals { wire: 25 * GB, relayed: 0, amax: 0 });
    near(report.imbalance, 20.0 / 12.5);
}

/// Trainer, rank 0 and rank 1, each on its own host.
fn chain(in_flight: u64) -> Traffic {
    traffic(1, 2, in_flight, vec![vec![send(0, 0, GB), relay(0, 1, GB)]; 2])
}

#[test]
fn a_chain_overlaps_its_buckets() {
    let report = run(&chain(2), &cluster(1, 1));
    // The second bucket enters as the first is relayed.
    near(report.predicted_s, 3.0);
    assert_eq!(report.bytes, Totals { wire: 2 * GB, relayed: 2 * GB, amax: 0 });
    let row = |side, rank, sent, received, relayed| RankBytes {
        side,
        rank,
        sent: sent * GB,
        received: received * GB,
        relayed: relayed * GB,
    };
    assert_eq!(
        report.ranks,
        [
            row(Side::Trainer, 0, 2, 0, 0),
            row(Side::Inference, 0, 2, 2, 2),
            row(Side::Inference, 1, 0, 2, 0)
        ]
    );
}

#[test]
fn a_relay_is_sent_in_the_step_after() {
    // Even with one step in flight rank 0 relays one bucket while it receives the next.
    near(seconds(&chain(1), &cluster(1, 1)), 3.0);
    // 0 counts as 1, and more places than buckets as that many.
    near(seconds(&chain(0), &cluster(1, 1)), 3.0);
    near(seconds(&chain(1 << 60), &cluster(1, 1)), 3.0);
}

#[test]
fn a_sender_waits_for_the_bucket_whose_place_it_takes() {
    // Trainer 0's first message queues behind 4 s of trainer 1's and has arrived after 5 s.
    let first = vec![send(1, 0, 4 * GB), send(0, 0, GB)];
    let buckets = vec![first, vec![send(0, 1, GB)], vec![send(0, 1, GB)]];
    let timed = |in_flight| seconds(&traffic(2, 2, in_flight, buckets.clone()), &cluster(1, 1));
    // Both others wait; the last one waits; none does, and they end at 3 s.
    near(timed(1), 7.0);
    near(timed(2), 6.0);
    near(timed(3), 5.0);
}

#[test]
fn gpus_share_a_nic() {
    let all = vec![send(0, 0, GB), send(1, 1, GB)];
    let two = traffic(2, 2, 2, vec![all]);
    near(seconds(&two, &cluster(2, 2)), 1.0);
    near(seconds(&two, &cluster(2, 1)), 2.0);
    assert_eq!(busiest(&run(&two, &cluster(2, 1)), "nic in"), (2 * GB, 2.0));
}

#[test]
fn latency_and_the_amax_exchange_come_first() {
    let slow = Cluster { latency_us: 1e6, ..cluster(1, 1) };
    // Two latencies and 3 GB; then a latency and 1 GB for each hop.
    let mut two = chain(2);
    near(seconds(&two, &slow), 5.0);
    two.amax = vec![(GB, 2 * GB)];
    let report = run(&two, &slow);
    near(report.amax_s, 5.0);
    near(report.predicted_s, 10.0);
    assert_eq!(report.bytes.amax, GB);
    two.amax = vec![(0, 0)];
    near(seconds(&two, &slow), 5.0);
}

#[test]
fn nothing_to_do_takes_no_time() {
    let report = run(&traffic(2, 2, 2, vec![vec![]]), &cluster(1, 1));
    assert_eq!((report.predicted_s, report.roofline_s, report.imbalance), (0.0, 0.0, 1.0));
    assert!(report.links.is_empty());
}

#[test]
fn watchers_see_when_links_serve() {
    let mut seen = Vec::new();
    simulate(&chain(2), &cluster(1, 1), &mut |t| {
        seen.push((t.bucket, t.start_s, t.arrival_s));
    });
    assert_eq!(seen, [(0, 0.0, 1.0), (0, 1.0, 2.0), (1, 1.0, 2.0), (1, 2.0, 3.0)]);
}

#[test]
fn sixteen_hosts_fill_their_nics() {
    let mut fleet = traffic(256, 128, 2, vec![]);
    let all: Vec<RankId> = (0..128).map(RankId).collect();
    for rank in &all {
        fleet.values.add(31_720_000_000, &[0], &[*rank]);
    }
    fleet.values.add(14_240_000_000, &[1, 200], &all);
    let cluster = Cluster::default();
    let roofline = Roofline::of(&fleet, &cluster);
    // 8 × 31.72 + 14.24 = 268 GB a host over 8 NICs of 45 GB/s.
    near(roofline.into_hosts_s, 268.0 / 360.0);
    assert_eq!(roofline.into_hosts_bytes, 16 * 268 * GB);
    near(roofline.into_gpus_s, 45.96 / 415.0);
    // Host 0 alone holds what is a rank's own; host 25 has the rest too.
    near(roofline.out_of_hosts_s, 128.0 * 31.72 / 360.0);
}

#[test]
fn a_host_need_not_fetch_what_it_holds() {
    let mut one = traffic(1, 3, 2, vec![]);
    // Trainer and rank 0 on the first host, ranks 1 and 2 on the second.
    one.values.add(10 * GB, &[0], &[RankId(0)]);
    near(Roofline::of(&one, &cluster(2, 1)).seconds(), 1.0);
    one.values.add(GB, &[0], &[0, 1, 2].map(RankId));
    let roofline = Roofline::of(&one, &cluster(2, 1));
    near(roofline.into_gpus_s, 1.1);
    near(roofline.into_hosts_s, 1.0);
    near(roofline.out_of_hosts_s, 1.0);
    assert_eq!(roofline.into_hosts_bytes, GB);
}

#[test]
fn the_json_has_its_keys() {
    let json = serde_json::to_value(run(&chain(2), &cluster(1, 1))).unwrap();
    assert_eq!(json["schema"], 1);
    assert_eq!(json["bytes"]["wire"], 2 * GB);
    assert_eq!(json["links"][0]["class"], "nic out");
    assert_eq!(json["ranks"][0]["side"], "trainer");
    assert_eq!(json["ranks"][2]["side"], "inference");
}

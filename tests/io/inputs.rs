//! JSON inputs: configs, receiver manifests, expert maps, source manifests.

use std::fs;
use std::path::Path;

use kernelcast::dtype::DType;
use kernelcast::io::{
    ExpertMapFile, ReceiverManifest, SourceManifest, read_cluster, read_config,
};
use kernelcast::topo::{Cluster, Placement};
use tempfile::tempdir;

use super::one;

#[test]
fn configs() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("config.json");
    one(read_config(dir.path()), "E0417", &["there is no", "config.json", "give the model"]);
    fs::write(&path, "{\"hidden_size\": 64,\n \"x\": [1,]}").unwrap();
    one(read_config(dir.path()), "E0417", &["config.json, line 2, column 10: "]);
    for number in ["Infinity", "-Infinity", "NaN"] {
        fs::write(&path, format!("{{\n\"limit\": [0.0, {number}], \"b\": 1}}")).unwrap();
        let word = number.trim_start_matches('-');
        one(read_config(dir.path()), "E0417", &["line 2", &format!("Python writes {word}")]);
    }
    fs::write(&path, "[1]").unwrap();
    one(read_config(&path), "E0417", &["not a JSON object"]);
    fs::write(&path, "{\"hidden_size\": 64}").unwrap();
    for given in [dir.path(), &path] {
        let (config, at) = read_config(given).unwrap();
        assert_eq!((config["hidden_size"].as_u64(), at), (Some(64), path.clone()));
    }
}

#[test]
fn manifests() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/io");
    let receiver = ReceiverManifest::read(&data.join("receiver.json")).unwrap();
    let topology = receiver.topology.as_ref().unwrap();
    assert_eq!((topology.tp, topology.ep_rank, topology.pp), (Some(2), 1, None));
    assert_eq!(receiver.parameters[1].dtype(), Some(DType::E4m3));
    assert_eq!(receiver.parameters[2].stride.as_deref(), Some(&[1, 4][..]));
    assert_eq!(
        (receiver.buffers[0].dtype(), receiver.buffers[0].persistent),
        (None, Some(false))
    );
    assert_eq!(receiver.aliases[0].of, "model.embed_tokens.weight");
    assert!(receiver.rest.contains_key("vllm_info"));
    let refused = ReceiverManifest::read(&data.join("refused.json")).unwrap();
    assert!(refused.refused.unwrap().contains("divisible"));

    let experts = ExpertMapFile::read(&data.join("experts.json")).unwrap();
    assert_eq!(experts.layers["model.layers.3"], [0, 2, 1, 2]);
    let source = SourceManifest::read(&data.join("source.json")).unwrap();
    assert_eq!(source.mesh[1], ("fsdp".to_owned(), 8));
    let placements = [
        Placement::Replicate,
        Placement::Shard(0),
        Placement::StridedShard { dim: 1, split: 4 },
    ];
    assert_eq!(source.tensors[0].placements, placements);
    let again: SourceManifest =
        serde_json::from_value(serde_json::to_value(&source).unwrap()).unwrap();
    assert_eq!(again, source);
}

#[test]
fn refused_manifests() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.json");
    let tensor = |more: &str| {
        format!(
            r#"{{"schema":1,"mesh":[["fsdp",8]],"tensors":[{{"name":"w","dtype":"bfloat16","shape":[4],{more}}}]}}"#
        )
    };
    let sources = [
        (tensor(r#""placements":["P"]"#), "\"P\" is no placement"),
        (tensor(r#""placements":["S(-1)"]"#), "is no placement"),
        (tensor(r#""placements":["SS(0,0)"]"#), "is no placement"),
        (tensor(r#""placements":["S(1)"]"#), "no dim for S(1)"),
        (tensor(r#""placements":["R","R"]"#), "w has 2 placements, the mesh has 1"),
        (r#"{"schema":2,"mesh":[],"tensors":[]}"#.into(), "schema is 2"),
        (r#"{"schema":1,"mesh":[["a",0]],"tensors":[]}"#.into(), "axis a has size 0"),
        (r#"{"schema":1,"mesh":[["a",1],["a",2]],"tensors":[]}"#.into(), "lists a twice"),
        (
            r#"{"schema":1,"mesh":[["a",4294967296],["b",4294967296]],"tensors":[]}"#.into(),
            "mesh has more than 1048576 ranks",
        ),
        (tensor(r#""placements":["SS(0,1048577)"]"#), "has more than 1048576 parts"),
        (tensor(r#""placements":["R"],"on":{"pp":0}"#), "w is on axis pp, which the mesh"),
        (tensor(r#""placements":["R"],"on":{"fsdp":8}"#), "fsdp=8, the axis has size 8"),
        (tensor(r#""placements":["S(0)"],"on":{"fsdp":1}"#), "fsdp=1 and cut by fsdp"),
        (r#"{"schema":1,"mesh":[]}"#.into(), "line 1"),
    ];
    for (text, words) in sources {
        fs::write(&path, text).unwrap();
        one(SourceManifest::read(&path), "E0419", &["x.json", words]);
    }
    for (text, words) in [
        (r#"{"schema":3,"layers":{}}"#, "schema is 3"),
        (r#"{"schema":1,"layers":{"a":[0],"a":[0]}}"#, "lists a twice"),
        (
            r#"{"schema":1,"layers":{"a":[-1]}}"#,
            "slot 0 of a is -1: it is not assigned to an expert",
        ),
    ] {
        fs::write(&path, text).unwrap();
        one(ExpertMapFile::read(&path), "E0419", &[words]);
    }
    for (text, words) in [
        (r#"{"relative_to":"y.json"}"#, "difference"),
        (r#"{"model":"m"}"#, "no parameters"),
        (r#"{"parameters":[{"name":"a","dtype":"bfloat16"}]}"#, "shape"),
    ] {
        fs::write(&path, text).unwrap();
        one(ReceiverManifest::read(&path), "E0419", &[words]);
    }
    one(ExpertMapFile::read(&dir.path().join("absent")), "E0601", &["expert map", "absent"]);
}

#[test]
fn cluster_files() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("c.json");
    let all = r#"{"schema":1,"gpus_per_host":4,"nics_per_host":2,"nvlink_gb_s":900,
                  "nic_gb_s":50,"latency_us":0}"#;
    fs::write(&path, all).unwrap();
    let Cluster { gpus_per_host, nics_per_host, .. } = read_cluster(&path).unwrap();
    assert_eq!((gpus_per_host, nics_per_host), (4, 2));
    fs::write(&path, "{}").unwrap();
    assert_eq!(read_cluster(&path).unwrap(), Cluster::default());
    for (text, words) in [
        ("[]", "expected a map"),
        (r#"{"schema":2}"#, "schema is 2"),
        (r#"{"gpus":8}"#, "unknown field `gpus`"),
        (r#"{"gpus_per_host":8,"gpus_per_host":8}"#, "duplicate field"),
        (r#"{"gpus_per_host":0}"#, "gpus_per_host is 0, not 1 to"),
        (r#"{"gpus_per_host":-1}"#, "line 1, column 19"),
        (r#"{"nics_per_host":0}"#, "nics_per_host is 0"),
        (r#"{"nics_per_host":3}"#, "8 GPUs cannot be spread evenly"),
        (r#"{"nics_per_host":16}"#, "count several NICs of one GPU as one"),
        (r#"{"nic_gb_s":-45}"#, "nic_gb_s is -45, not 0.001 to"),
        (r#"{"nvlink_gb_s":0}"#, "nvlink_gb_s is 0"),
        (r#"{"nvlink_gb_s":NaN}"#, "Python writes NaN"),
        (r#"{"nic_gb_s":1e999}"#, "out of range"),
        (r#"{"latency_us":-1}"#, "latency_us is -1"),
    ] {
        fs::write(&path, text).unwrap();
        one(read_cluster(&path), "E0419", &["cluster file", "c.json", words]);
    }
    one(read_cluster(&dir.path().join("absent")), "E0601", &["cluster file", "absent"]);
}

//! Whatever can be copied out of this repository to run AuraLink by: configurations, compose files, manifests, the examples of the
//! documents. AuraLink's own parser reads what is AuraLink's; of the rest it is looked whether it fits that, and the command line.

#![allow(clippy::panic, clippy::unwrap_used)]

use auralink::config::Settings;
use serde::Deserialize;
use serde_yaml::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a YAML file of the repository is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    AuraLink,
    LiveKit,
    Compose,
    Kubernetes,
    Prometheus,
}

/// Every one of them, so that a new file is either here or a failure.
const FILES: [(&str, Kind); 9] = [
    ("config/auralink.yaml", Kind::AuraLink),
    ("config/edge.yaml", Kind::AuraLink),
    ("config/kubernetes/edge.yaml", Kind::Kubernetes),
    ("config/kubernetes/sidecar.yaml", Kind::Kubernetes),
    ("config/origin.yaml", Kind::AuraLink),
    ("config/prometheus.yml", Kind::Prometheus),
    ("docker-compose.edge.yml", Kind::Compose),
    ("docker-compose.yml", Kind::Compose),
    ("livekit/livekit.yaml", Kind::LiveKit),
];

/// Seconds from the end of `session.drain_grace` until the process has surely ended (docs/operating.md).
const AFTER_DRAIN: u64 = 10;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn yaml(file: &str) -> Value {
    serde_yaml::from_str(&read(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn of_kind(kind: Kind) -> impl Iterator<Item = &'static str> {
    FILES
        .into_iter()
        .filter(move |(_, k)| *k == kind)
        .map(|(file, _)| file)
}

/// The node at `a.b.c`; [`Value::Null`] where there is none.
fn at<'v>(value: &'v Value, path: &str) -> &'v Value {
    path.split('.')
        .fold(value, |value, key| value.get(key).unwrap_or(&Value::Null))
}

fn list(value: &Value) -> Vec<&Value> {
    value
        .as_sequence()
        .map(|items| items.iter().collect())
        .unwrap_or_default()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn words(value: &Value) -> Vec<&str> {
    list(value).into_iter().map(text).collect()
}

/// `auralink --check` takes it, and warns of nothing but what only the place where it will run can have: models,
/// descriptors, and an address in place of an example.
fn checked(what: &str, config: &str) -> Settings {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("auralink.yaml");
    fs::write(&file, config).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_auralink"))
        .args(["--check", "--config"])
        .arg(&file)
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{what}: {said}");
    let elsewhere = |line: &&str| {
        [
            "engine.models: ",
            "engine.runtime: ",
            "file descriptors, and ",
            "is an address for examples",
        ]
        .iter()
        .any(|known| line.contains(known))
    };
    let left: Vec<_> = said.lines().filter(|line| !elsewhere(line)).collect();
    assert!(left.is_empty(), "{what}: {left:#?}\n{config}");
    Settings::parse(config).unwrap().settings
}

/// What the binary says to these arguments in place of running, as far as they are right: the file's absence.
fn takes_arguments(what: &str, args: &[&str]) {
    let absent = "/nowhere/auralink.yaml";
    let mut args: Vec<&str> = args.to_vec();
    let at = args.iter().position(|arg| *arg == "--config");
    let at = at.unwrap_or_else(|| panic!("{what}: no --config in {args:?}"));
    args[at + 1] = absent;
    let output = Command::new(env!("CARGO_BIN_EXE_auralink"))
        .args(&args)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.starts_with(absent), "{what}: {args:?}: {said}");
}

/// The file that a command line names.
fn named<'a>(args: &[&'a str]) -> &'a str {
    let at = args.iter().position(|arg| *arg == "--config").unwrap();
    args[at + 1]
}

/// A port on a host.
type Port = (&'static str, u16);

/// What a sidecar listens on; UDP ports as many as workers.
fn ports(settings: &Settings) -> BTreeSet<Port> {
    let media = &settings.media;
    let workers = u16::try_from(media.workers).unwrap();
    let udp = (0..workers).map(|n| ("UDP", media.udp_port + n));
    let tcp = media.tcp_port.map(|port| ("TCP", port));
    udp.chain(tcp)
        .chain([("TCP", settings.listen.port())])
        .collect()
}

fn livekit_ports(livekit: &Value) -> BTreeSet<Port> {
    let port = |path: &str| {
        at(livekit, path)
            .as_u64()
            .map(|n| u16::try_from(n).unwrap())
    };
    [
        ("TCP", port("port")),
        ("UDP", port("rtc.udp_port")),
        ("TCP", port("rtc.tcp_port")),
    ]
    .into_iter()
    .filter_map(|(kind, port)| Some((kind, port?)))
    .collect()
}

/// The version that `make setup` builds, and that everything is tested with.
fn livekit_image() -> String {
    let setup = read("scripts/setup.sh");
    let version = setup
        .lines()
        .find_map(|l| l.strip_prefix("livekit_version="));
    format!("livekit/livekit-server:{}", version.unwrap())
}

/// `30s`.
fn seconds(text: &str) -> u64 {
    text.strip_suffix('s')
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| panic!("{text}"))
}

fn outlives_the_drain(what: &str, patience: u64, settings: &Settings) {
    let drain = settings.session.drain_grace.as_secs();
    assert!(
        patience >= drain + AFTER_DRAIN,
        "{what}: killed after {patience} s, and draining takes {drain} s and up to {AFTER_DRAIN} more"
    );
}

#[test]
fn every_yaml_file_is_known_here() {
    let mut found = BTreeSet::new();
    let mut folders: Vec<PathBuf> = vec![root().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            let ours = ["config", "livekit", "docs"]
                .iter()
                .any(|top| name.starts_with(top));
            if path.is_dir() && ours {
                folders.push(path);
            } else if name.ends_with(".yaml") || name.ends_with(".yml") {
                found.insert(name);
            }
        }
    }
    let known: BTreeSet<String> = FILES.iter().map(|(file, _)| (*file).to_owned()).collect();
    assert_eq!(found, known, "left: there; right: read by this test");
}

#[test]
fn configurations_can_be_used_as_they_are() {
    let all: BTreeMap<&str, Settings> = of_kind(Kind::AuraLink)
        .map(|file| (file, checked(file, &read(file))))
        .collect();
    let [edge, origin] = ["config/edge.yaml", "config/origin.yaml"].map(|file| &all[file]);
    // Beside each other and LiveKit on one host, as both say of themselves.
    let livekit = yaml("livekit/livekit.yaml");
    let taken = [ports(edge), ports(origin), livekit_ports(&livekit)];
    let together: BTreeSet<Port> = taken.iter().flatten().copied().collect();
    assert_eq!(
        together.len(),
        taken.iter().map(BTreeSet::len).sum::<usize>(),
        "{taken:?}"
    );
    assert_ne!(edge.admin.listen, origin.admin.listen);
    let dialled = |settings: &Settings| (settings.upstream.https, settings.upstream.port);
    assert_eq!(dialled(edge), (false, origin.listen.port()));
    for settings in [origin, &all["config/auralink.yaml"]] {
        let port = at(&livekit, "port").as_u64().unwrap();
        assert_eq!(dialled(settings), (false, u16::try_from(port).unwrap()));
    }
    // All clients of the origin come from one address.
    assert_eq!(origin.limits.connections_per_address, 0);
    assert_eq!(edge.engine.codec, origin.engine.codec);
}

#[test]
fn the_image_runs_what_the_binary_takes() {
    let lines = read("Dockerfile");
    let words_of = |key: &str| -> Vec<String> {
        let line = lines
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap();
        serde_yaml::from_str(line).unwrap()
    };
    assert_eq!(words_of("ENTRYPOINT "), ["auralink"]);
    let command = words_of("CMD ");
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    takes_arguments("Dockerfile", &command);
    let copied = format!("COPY config/auralink.yaml {}", named(&command));
    assert!(lines.contains(&copied), "{copied}");
}

/// Services as `docker compose -f A -f B` would have them: keys of later files go before those of earlier ones.
fn composed(files: &[&str]) -> BTreeMap<String, Value> {
    let mut services: BTreeMap<String, Value> = BTreeMap::new();
    for file in files {
        let parsed = yaml(file);
        for (name, service) in at(&parsed, "services").as_mapping().unwrap() {
            let known = services
                .entry(text(name).to_owned())
                .or_insert_with(|| Value::Mapping(Default::default()));
            let known = known.as_mapping_mut().unwrap();
            for (key, value) in service.as_mapping().unwrap() {
                known.insert(key.clone(), value.clone());
            }
        }
    }
    services
}

/// Mounted paths and where they come from, of both spellings.
fn mounts(service: &Value) -> Vec<(String, String, bool)> {
    let of = |volume: &Value| match volume {
        Value::String(short) => {
            let parts: Vec<&str> = short.split(':').collect();
            assert!((2..=3).contains(&parts.len()), "{short}");
            let read_only = parts.get(2) == Some(&"ro");
            (parts[1].to_owned(), parts[0].to_owned(), read_only)
        }
        long => {
            assert_eq!(text(at(long, "type")), "bind", "{long:?}");
            let read_only = at(long, "read_only").as_bool() == Some(true);
            (
                text(at(long, "target")).to_owned(),
                text(at(long, "source")).to_owned(),
                read_only,
            )
        }
    };
    list(at(service, "volumes")).into_iter().map(of).collect()
}

/// The file of this repository that a container sees at `path`.
fn behind(mounts: &[(String, String, bool)], path: &str) -> Option<String> {
    mounts.iter().find_map(|(target, source, _)| {
        let rest = Path::new(path).strip_prefix(target).ok()?;
        let source = Path::new(source.strip_prefix("./")?);
        let file = if rest == Path::new("") {
            source.to_owned()
        } else {
            source.join(rest)
        };
        Some(file.display().to_string())
    })
}

fn compose_fits(files: &[&str], expected: &[&str]) {
    let services = composed(files);
    let names: Vec<&str> = services.keys().map(String::as_str).collect();
    assert_eq!(names, expected, "{files:?}");
    let mut taken: Vec<BTreeSet<Port>> = Vec::new();
    let mut upstreams = Vec::new();
    let mut served = BTreeSet::new();
    for (name, service) in &services {
        let what = format!("{files:?}: {name}");
        for other in words(at(service, "depends_on")) {
            assert!(services.contains_key(other), "{what} depends on {other}");
        }
        // They advertise their ports by number.
        assert_eq!(text(at(service, "network_mode")), "host", "{what}");
        let mounts = mounts(service);
        assert!(
            mounts.iter().all(|(_, _, read_only)| *read_only),
            "{what}: {mounts:?}"
        );
        if name == "livekit" {
            assert_eq!(text(at(service, "image")), livekit_image(), "{what}");
            let file = behind(&mounts, named(&words(at(service, "command")))).unwrap();
            let livekit = yaml(&file);
            taken.push(livekit_ports(&livekit));
            served.insert(u16::try_from(at(&livekit, "port").as_u64().unwrap()).unwrap());
            continue;
        }
        assert_eq!(
            text(at(service, "build")),
            ".",
            "{what}: the Dockerfile is here"
        );
        let command = words(at(service, "command"));
        // The image's own.
        let command = if command.is_empty() {
            vec!["--config", "/etc/auralink/auralink.yaml"]
        } else {
            command
        };
        takes_arguments(&what, &command);
        let file = behind(&mounts, named(&command))
            .unwrap_or_else(|| panic!("{what}: {command:?} is not mounted"));
        let settings = checked(&what, &read(&file));
        let patience = text(at(service, "stop_grace_period"));
        outlives_the_drain(&what, seconds(patience), &settings);
        let engine = &settings.engine;
        for path in engine.models.iter().chain(&engine.runtime) {
            assert!(
                mounts.iter().any(|(target, ..)| path.starts_with(target)),
                "{what}: {} is not mounted",
                path.display()
            );
        }
        taken.push(ports(&settings));
        served.insert(settings.listen.port());
        upstreams.push((what, settings.upstream.port));
    }
    for (what, port) in upstreams {
        assert!(
            served.contains(&port),
            "{what}: nobody serves its upstream's port {port}"
        );
    }
    let together: BTreeSet<Port> = taken.iter().flatten().copied().collect();
    // media.workers of config/auralink.yaml is the number of cores; from 7982 on there is room.
    assert_eq!(
        together.len(),
        taken.iter().map(BTreeSet::len).sum::<usize>(),
        "{taken:?}"
    );
}

#[test]
fn compose_files_fit_configurations_and_command_line() {
    compose_fits(&["docker-compose.yml"], &["auralink", "livekit"]);
    compose_fits(
        &["docker-compose.yml", "docker-compose.edge.yml"],
        &["auralink", "edge", "livekit"],
    );
    assert_eq!(
        of_kind(Kind::Compose).count(),
        2,
        "a new one is to be read above"
    );
}

/// One pod of a manifest with what it is made of.
struct Pod<'v> {
    what: String,
    spec: &'v Value,
    /// Of the same file, by name: file name to content.
    maps: &'v BTreeMap<String, BTreeMap<String, String>>,
}

impl Pod<'_> {
    /// Where a path of a container comes from: the ConfigMap's file, or `None` for what the pod makes or is given.
    fn volume(&self, container: &Value, path: &str) -> (&Value, String) {
        let mounts = list(at(container, "volumeMounts"));
        let found = mounts.into_iter().find_map(|mount| {
            let rest = Path::new(path)
                .strip_prefix(text(at(mount, "mountPath")))
                .ok()?;
            Some((text(at(mount, "name")), rest.display().to_string()))
        });
        let (name, rest) = found.unwrap_or_else(|| panic!("{}: {path} is not mounted", self.what));
        let volumes = list(at(self.spec, "volumes"));
        let volume = volumes
            .into_iter()
            .find(|volume| text(at(volume, "name")) == name);
        (
            volume.unwrap_or_else(|| panic!("{}: no volume {name}", self.what)),
            rest,
        )
    }

    /// A ConfigMap's file as a container sees it.
    fn config(&self, container: &Value, path: &str) -> &str {
        let (volume, rest) = self.volume(container, path);
        let map = text(at(volume, "configMap.name"));
        let files = self
            .maps
            .get(map)
            .unwrap_or_else(|| panic!("{}: no ConfigMap {map:?} for {path}", self.what));
        files
            .get(&rest)
            .unwrap_or_else(|| panic!("{}: {map} holds no {rest}", self.what))
    }

    /// AuraLink's configuration, which an init container takes from the ConfigMap with the node's address in it.
    fn auralink(&self, path: &str) -> Settings {
        let inits = list(at(self.spec, "initContainers"));
        let init = inits
            .first()
            .unwrap_or_else(|| panic!("{}: nobody writes {path}", self.what));
        let script = words(at(init, "command"));
        let script = script.last().unwrap();
        let (source, target) = script.rsplit_once(" > ").unwrap();
        assert_eq!(target, path, "{}", self.what);
        let source = source.rsplit(' ').next().unwrap();
        let config = self.config(init, source);
        assert!(
            config.contains("NODE_IP") && script.contains("s/NODE_IP/$NODE_IP/"),
            "{script}"
        );
        let env = list(at(init, "env"));
        assert!(
            env.iter().any(|var| text(at(var, "name")) == "NODE_IP"),
            "{}",
            self.what
        );
        checked(&self.what, &config.replace("NODE_IP", "10.0.0.1"))
    }
}

fn pod_fits(pod: &Pod<'_>) -> Settings {
    let what = &pod.what;
    let mut used = BTreeSet::new();
    let (mut auralink, mut livekit) = (None, None);
    let all = [at(pod.spec, "initContainers"), at(pod.spec, "containers")];
    for container in all.into_iter().flat_map(list) {
        for mount in list(at(container, "volumeMounts")) {
            used.insert(text(at(mount, "name")).to_owned());
        }
        let image = text(at(container, "image"));
        if image.starts_with("livekit/") {
            assert_eq!(image, livekit_image(), "{what}");
            let config = pod.config(container, named(&words(at(container, "args"))));
            let value: Value = serde_yaml::from_str(config).unwrap();
            livekit = Some(value);
        } else if image.starts_with("auralink") {
            assert_eq!(
                image,
                concat!("auralink:", env!("CARGO_PKG_VERSION")),
                "{what}"
            );
            auralink = Some(container);
        }
    }
    let container = auralink.unwrap();
    assert!(at(container, "args").is_null() && at(container, "command").is_null());
    let path = "/etc/auralink/auralink.yaml";
    let (volume, _) = pod.volume(container, path);
    assert!(
        !at(volume, "emptyDir").is_null(),
        "{what}: the init container writes to it"
    );
    let settings = pod.auralink(path);

    let opened: BTreeSet<Port> = list(at(container, "ports"))
        .into_iter()
        .map(|port| {
            let kind = if text(at(port, "protocol")) == "UDP" {
                "UDP"
            } else {
                "TCP"
            };
            (
                kind,
                u16::try_from(at(port, "containerPort").as_u64().unwrap()).unwrap(),
            )
        })
        .collect();
    assert_eq!(opened, ports(&settings), "{what}");
    for (probe, path) in [("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")] {
        let get = at(container, &format!("{probe}.httpGet")).clone();
        let dialled = format!(
            "{}:{}",
            text(at(&get, "host")),
            at(&get, "port").as_u64().unwrap()
        );
        assert_eq!(
            dialled,
            settings.admin.listen.to_string(),
            "{what}: {probe}"
        );
        assert_eq!(text(at(&get, "path")), path, "{what}");
    }
    let patience = at(pod.spec, "terminationGracePeriodSeconds")
        .as_u64()
        .unwrap();
    outlives_the_drain(what, patience, &settings);
    let engine = &settings.engine;
    for path in engine.models.iter().chain(&engine.runtime) {
        let _ = pod.volume(container, path.to_str().unwrap());
    }
    if engine.runtime.is_some()
        && at(container, "securityContext.readOnlyRootFilesystem").as_bool() == Some(true)
    {
        let (volume, _) = pod.volume(container, "/tmp/a-private-copy");
        assert!(!at(volume, "emptyDir").is_null(), "{what}");
    }
    if let Some(livekit) = livekit {
        let port = at(&livekit, "port").as_u64();
        assert_eq!(port, Some(settings.upstream.port.into()), "{what}");
        assert!(
            ports(&settings).is_disjoint(&livekit_ports(&livekit)),
            "{what}"
        );
    }
    let declared: BTreeSet<String> = list(at(pod.spec, "volumes"))
        .into_iter()
        .map(|v| text(at(v, "name")).to_owned())
        .collect();
    assert_eq!(
        declared, used,
        "{what}: volumes that are declared, and used"
    );
    settings
}

#[test]
fn manifests_fit_their_configurations() {
    for file in of_kind(Kind::Kubernetes) {
        let content = read(file);
        let documents: Vec<Value> = serde_yaml::Deserializer::from_str(&content)
            .map(|document| Value::deserialize(document).unwrap_or_else(|e| panic!("{file}: {e}")))
            .collect();
        let named = |kind: &str| -> Vec<(&str, &Value)> {
            let of = documents.iter().filter(|d| text(at(d, "kind")) == kind);
            of.map(|d| (text(at(d, "metadata.name")), d)).collect()
        };
        let maps: BTreeMap<String, BTreeMap<String, String>> = named("ConfigMap")
            .into_iter()
            .map(|(name, map)| {
                (
                    name.to_owned(),
                    serde_yaml::from_value(at(map, "data").clone()).unwrap(),
                )
            })
            .collect();
        let (deployments, services) = (named("Deployment"), named("Service"));
        assert_eq!(
            documents.len(),
            maps.len() + deployments.len() + services.len(),
            "{file}: a kind that isn't read here"
        );
        assert!(!deployments.is_empty(), "{file}");
        for (name, deployment) in &deployments {
            let spec = at(deployment, "spec.template.spec");
            let what = format!("{file}: {name}");
            let settings = pod_fits(&Pod {
                what: what.clone(),
                spec,
                maps: &maps,
            });
            let labels = at(deployment, "spec.template.metadata.labels");
            assert_eq!(
                at(deployment, "spec.selector.matchLabels"),
                labels,
                "{what}"
            );
            let (_, service) = services
                .iter()
                .find(|(_, s)| at(s, "spec.selector") == labels)
                .unwrap();
            let ports = list(at(service, "spec.ports"));
            let [port] = ports.as_slice() else {
                panic!("{what}: {ports:?}")
            };
            assert_eq!(text(at(port, "targetPort")), "signal", "{what}");
            let containers = list(at(spec, "containers"));
            let opened = containers.iter().flat_map(|c| list(at(c, "ports")));
            let signal = opened
                .into_iter()
                .find(|p| text(at(p, "name")) == "signal")
                .unwrap();
            assert_eq!(
                at(signal, "containerPort").as_u64(),
                Some(settings.listen.port().into())
            );
        }
    }
}

#[test]
fn prometheus_scrapes_where_the_admin_listener_is() {
    for file in of_kind(Kind::Prometheus) {
        let parsed = yaml(file);
        let jobs = list(at(&parsed, "scrape_configs"));
        let targets: Vec<&str> = jobs
            .iter()
            .flat_map(|job| list(at(job, "static_configs")))
            .flat_map(|config| words(at(config, "targets")))
            .collect();
        assert_eq!(
            targets,
            [Settings::parse("")
                .unwrap()
                .settings
                .admin
                .listen
                .to_string()]
        );
    }
}

/// The keys at the top of a configuration.
const TOP: [&str; 13] = [
    "listen", "tls", "upstream", "media", "admin", "limits", "session", "log", "metrics", "engine",
    "audit", "defaults", "rooms",
];

fn begins_like_a_configuration(block: &str) -> bool {
    block
        .lines()
        .find(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .and_then(|line| line.split_once(':'))
        .is_some_and(|(key, _)| TOP.contains(&key))
}

/// Fenced blocks that are configurations, those in a shell's here-documents too.
fn blocks(markdown: &str) -> Vec<String> {
    let mut found = Vec::new();
    for fenced in markdown.split("\n```").skip(1).step_by(2) {
        let (_, fenced) = fenced.split_once('\n').unwrap_or_default();
        match fenced
            .split_once("<<'YAML'\n")
            .and_then(|(_, rest)| rest.split_once("\nYAML\n"))
        {
            Some((document, _)) => found.push(document.to_owned()),
            None if begins_like_a_configuration(fenced) => found.push(fenced.to_owned()),
            None => {}
        }
    }
    found
}

/// `audio: { recode: L4 }` and the like in running text, made a whole configuration.
fn fragments(markdown: &str) -> Vec<String> {
    let of_a_rule = ["mode", "rung", "disclose", "audio", "video"];
    let mut found = Vec::new();
    for code in markdown
        .lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
    {
        let Some((key, value)) = code.split_once(": ") else {
            continue;
        };
        // `tls: { cert, key }`, `audit: { log: FILE }`: names in place of values.
        if value.contains("FILE") || value.contains("cert, key") {
            continue;
        }
        if of_a_rule.contains(&key) {
            let mode = if key == "mode" { "" } else { "mode: lean, " };
            found.push(format!("rooms: [{{ match: a, {mode}{code} }}]\n"));
        } else if TOP.contains(&key) {
            found.push(format!("{code}\n"));
        } else if let Some((section, key)) = key.split_once('.')
            && TOP.contains(&section)
        {
            found.push(format!("{section}: {{ {key}: {value} }}\n"));
        }
    }
    found
}

#[test]
fn examples_of_the_documents_can_be_copied() {
    let mut seen = (0, 0);
    for file in ["README.md", "docs/operating.md", "docs/privacy.md"] {
        let markdown = read(file);
        for block in blocks(&markdown) {
            checked(file, &block);
            seen.0 += 1;
        }
        for fragment in fragments(&markdown) {
            // Not what it says of this machine: that it is read.
            if let Err(problems) = Settings::parse(&fragment) {
                panic!("{file}: {problems}\n{fragment}");
            }
            seen.1 += 1;
        }
    }
    assert!(seen.0 >= 2 && seen.1 >= 8, "blocks and fragments: {seen:?}");
}

//! Arguments, `--check`, exit codes: 0 done, 1 failed while running, 2 wrong arguments or a
//! configuration that cannot be used.

use auralink::config::{self, Loaded, Problem};
use auralink::surroundings::{self, When};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const RUN_FAILED: u8 = 1;
const BAD_CONFIG: u8 = 2;

/// Signalling is a few messages a second for each participant.
const CONTROL_THREADS: usize = 2;

/// A media proxy in front of an unmodified LiveKit server that saves bandwidth.
#[derive(Parser)]
#[command(version = auralink::VERSION, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed while running, 2 wrong arguments or configuration; warnings leave it at 0.\n\
    SIGHUP reloads the file, SIGTERM drains and ends. config/auralink.yaml documents every key."
)]
struct Args {
    /// The configuration, YAML
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    /// Say what is wrong with the file and those that it names, and what can't be right on this machine, with line and column, and end; nothing is bound
    #[arg(long)]
    check: bool,
    /// With --check: show the effective settings of this room
    #[arg(long, value_name = "NAME", requires = "check")]
    room: Option<String>,
    /// With --room: of this participant
    #[arg(long, value_name = "ID", requires = "room")]
    identity: Option<String>,
    /// With --room: of participants whose token this API key signed
    #[arg(long, value_name = "KEY", requires = "room")]
    api_key: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Bundles of models for the hop between two AuraLinks (docs/models.md)
    #[command(subcommand)]
    Models(Models),
}

#[derive(Subcommand)]
enum Models {
    /// Check a bundle's files, run it, and say how fast it is on this machine
    Verify {
        /// The bundle's folder
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// libonnxruntime.so; else $AURALINK_ONNXRUNTIME, else the one that `make models` put
        /// beside the folder of bundles
        #[arg(long, value_name = "FILE")]
        runtime: Option<PathBuf>,
    },
}

/// The whole command.
pub(crate) fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // clap's own code: 0 for --help and --version, 2 for the rest.
            let code = u8::try_from(error.exit_code()).unwrap_or(BAD_CONFIG);
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let Some(path) = &args.config else {
        return match args.command {
            Some(Command::Models(Models::Verify { folder, runtime })) => {
                match runtime_for(&folder, runtime) {
                    Ok(runtime) => verify(&folder, &runtime),
                    Err(error) => {
                        let _ = writeln!(std::io::stderr(), "error: {error}");
                        ExitCode::from(BAD_CONFIG)
                    }
                }
            }
            // clap asks for one or the other.
            None => ExitCode::from(BAD_CONFIG),
        };
    };
    let file = path.display().to_string();
    let loaded = match config::load(path) {
        Ok(loaded) => loaded,
        Err(problems) => {
            report(&file, "error", &problems.0);
            return ExitCode::from(BAD_CONFIG);
        }
    };
    if args.check {
        return check(&args, &file, &loaded);
    }
    auralink::logging::init(&loaded.settings.log);
    let found = surroundings::look(&loaded, When::Started);
    for problem in loaded.warnings.iter().chain(&found.warnings) {
        tracing::warn!("{}", problem.line(&file, "warning"));
    }
    // Signalling and the admin pages; media has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime
            .block_on(auralink::run(loaded, path))
            .map_err(|fault| fault.to_string()),
        Err(error) => Err(format!("no threads for signalling: {error}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "auralink: {error}");
            ExitCode::from(RUN_FAILED)
        }
    }
}

/// Names libonnxruntime.so to scripts and tests.
const RUNTIME_VARIABLE: &str = "AURALINK_ONNXRUNTIME";

/// Where `make models` puts it, seen from a bundle.
const RUNTIME_BESIDE: &str = "../../onnxruntime/libonnxruntime.so";

/// The ONNX Runtime to run a bundle with: the one that was given, or that of the environment, or the one beside the folder of bundles.
fn runtime_for(folder: &Path, given: Option<PathBuf>) -> Result<PathBuf, String> {
    let variable = || std::env::var_os(RUNTIME_VARIABLE).filter(|value| !value.is_empty());
    if let Some(runtime) = given.or_else(|| variable().map(PathBuf::from)) {
        return Ok(runtime);
    }
    let beside = folder.join(RUNTIME_BESIDE);
    if beside.exists() {
        return Ok(beside);
    }
    Err(format!(
        "no ONNX Runtime at {}: give --runtime FILE (libonnxruntime.so, 1.22 or later), or set {RUNTIME_VARIABLE}; `make models` fetches one",
        beside.display()
    ))
}

fn verify(folder: &Path, runtime: &Path) -> ExitCode {
    match auralink_engine::verify(folder, runtime) {
        Ok(report) => match write!(std::io::stdout().lock(), "{report}") {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(RUN_FAILED),
        },
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{}: {error}", folder.display());
            ExitCode::from(RUN_FAILED)
        }
    }
}

fn report(file: &str, severity: &str, problems: &[Problem]) {
    let mut err = std::io::stderr().lock();
    for problem in problems {
        let _ = writeln!(err, "{}", problem.line(file, severity));
    }
}

fn check(args: &Args, file: &str, loaded: &Loaded) -> ExitCode {
    let found = surroundings::look(loaded, When::Checked);
    report(file, "error", &found.errors);
    report(file, "warning", &loaded.warnings);
    report(file, "warning", &found.warnings);
    if !found.errors.is_empty() {
        return ExitCode::from(BAD_CONFIG);
    }
    let s = &loaded.settings;
    let text = match &args.room {
        Some(room) => config::show_room(s, room, args.identity.as_deref(), args.api_key.as_deref()),
        None => {
            let rules = s.rules.rules().len();
            format!(
                "{file}: ok: {} → {}, {rules} room rules\n",
                s.listen, s.upstream
            )
        }
    };
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // Such as a closed pipe: nobody reads on.
        Err(_) => ExitCode::from(RUN_FAILED),
    }
}

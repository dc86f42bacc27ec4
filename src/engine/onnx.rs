//! ONNX Runtime: the library loaded at run time, and graphs that carry a state per stream.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::Session;
use ort::session::builder::GraphOptimizationLevel;
use ort::value::TensorRef;

use crate::bundle::{Dimension, Graph};
use crate::codec::CodecError;

/// The one environment of the process: ONNX Runtime allows no second, and is never unloaded.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// Loads `libonnxruntime.so`, the first time it is asked to; later calls give what the first successful one loaded.
///
/// # Errors
/// In words, with the path and what to do.
pub fn load(library: &Path) -> Result<Environment, String> {
    let mut environment = ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(environment) = &*environment {
        return Ok(environment.clone());
    }
    let explain = |error: &dyn std::fmt::Display| {
        format!(
            "{}: {error}; run `make models`, or set the path of libonnxruntime.so (1.22 or later) right",
            library.display()
        )
    };
    let mut magic = [0; 4];
    fs::File::open(library)
        .and_then(|mut file| file.read_exact(&mut magic))
        .map_err(|error| explain(&error))?;
    if magic != *b"\x7fELF" {
        return Err(explain(&"not a shared library"));
    }
    let copy = PrivateCopy::of(library);
    let path = copy.as_ref().map_or(library, |copy| copy.path.as_path());
    let made = ort::init_from(path)
        .map_err(|error| explain(&error))?
        .with_name("auralink")
        .with_telemetry(false)
        .with_logger(Arc::new(|level, category, _, _, message| match level {
            LogLevel::Error | LogLevel::Fatal => {
                tracing::warn!(target: "onnxruntime", category, "{message}");
            }
            _ => tracing::debug!(target: "onnxruntime", category, "{message}"),
        }))
        .build()
        .map_err(|error| explain(&error))?;
    *environment = Some(made.clone());
    Ok(made)
}

/// A copy of the library that nobody else can write to. Who overwrites a mapped library in place ends the process that runs it,
/// and with it every call; what is mapped from here stays as it was. The file is gone from the folder once it is loaded.
struct PrivateCopy {
    path: PathBuf,
}

impl PrivateCopy {
    fn of(library: &Path) -> Option<Self> {
        let name = format!(".auralink-onnxruntime-{}.so", std::process::id());
        let copy = Self {
            path: std::env::temp_dir().join(name),
        };
        // Left by an earlier process of the same number.
        let _ = fs::remove_file(&copy.path);
        let made = fs::read(library).and_then(|bytes| {
            fs::File::options()
                .write(true)
                .create_new(true)
                .mode(0o700)
                .open(&copy.path)?
                .write_all(&bytes)
        });
        match made {
            Ok(()) => Some(copy),
            Err(error) => {
                tracing::debug!(%error, "no room for a private copy of ONNX Runtime: the library is used where it is");
                None
            }
        }
    }
}

impl Drop for PrivateCopy {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// One stream's part of a batch.
#[derive(Debug)]
pub struct Row<'a> {
    /// What goes in.
    pub input: &'a [f32],
    /// The stream's state; all zeros at its beginning and again after an error.
    pub state: &'a mut [f32],
    /// What comes out.
    pub output: &'a mut [f32],
    /// Whether it did.
    pub done: Result<(), CodecError>,
}

/// Where the batch stands in a shape.
#[derive(Debug, Clone)]
struct Shape {
    sizes: Vec<usize>,
    batch: usize,
}

impl Shape {
    fn new(name: &str, dimensions: &[Dimension]) -> Result<Self, String> {
        let mut batch = None;
        let mut sizes = Vec::new();
        for (place, dimension) in dimensions.iter().enumerate() {
            match dimension {
                Dimension::Fixed(size) if (1..=1 << 24).contains(size) => sizes.push(*size),
                Dimension::Fixed(size) => return Err(format!("{name}: a size of {size}")),
                Dimension::Batch(_) if batch.is_none() => {
                    batch = Some(place);
                    sizes.push(1);
                }
                Dimension::Batch(_) => return Err(format!("{name}: two batch dimensions")),
            }
        }
        let batch = batch.ok_or_else(|| format!("{name}: no batch dimension"))?;
        if sizes
            .iter()
            .try_fold(1usize, |a, b| a.checked_mul(*b))
            .is_none_or(|n| n > 1 << 24)
        {
            return Err(format!("{name}: too large"));
        }
        Ok(Self { sizes, batch })
    }

    /// Numbers of one stream.
    fn each(&self) -> usize {
        self.sizes.iter().product()
    }

    /// Numbers that lie together.
    fn run(&self) -> usize {
        self.sizes.iter().skip(self.batch + 1).product()
    }

    fn of(&self, streams: usize) -> Vec<i64> {
        let mut sizes: Vec<i64> = self.sizes.iter().map(|n| *n as i64).collect();
        if let Some(batch) = sizes.get_mut(self.batch) {
            *batch = streams as i64;
        }
        sizes
    }

    /// Copies a stream's numbers from or to their places in a batch.
    fn places(
        &self,
        stream: usize,
        streams: usize,
    ) -> impl Iterator<Item = std::ops::Range<usize>> {
        let run = self.run();
        (0..self.each() / run).map(move |part| {
            let start = (part * streams + stream) * run;
            start..start + run
        })
    }
}

/// A graph that takes an input and a state and gives an output and the next state, for any number of streams at once.
#[derive(Debug)]
pub struct StatefulGraph {
    session: Session,
    graph: Graph,
    input: Shape,
    output: Shape,
    state: Shape,
    sample_rate: [i64; 1],
    /// Kept from batch to batch, so that nothing is allocated for them.
    inputs: Vec<f32>,
    states: Vec<f32>,
}

impl StatefulGraph {
    /// Builds a session of one thread.
    ///
    /// # Errors
    /// In words: the file isn't one that ONNX Runtime takes, or hasn't the inputs and outputs of the manifest.
    pub fn new(
        environment: &Environment,
        graph: &Graph,
        model: &[u8],
        sample_rate: usize,
    ) -> Result<Self, String> {
        let explain = |error: String| format!("{}: {error}", graph.file);
        let session = session(environment, model).map_err(|error| explain(error.to_string()))?;
        let has =
            |outlets: &[ort::value::Outlet], name: &str| outlets.iter().any(|o| o.name() == name);
        for name in [&graph.input.name, &graph.state.input]
            .into_iter()
            .chain(&graph.sample_rate_input)
        {
            if !has(session.inputs(), name) {
                return Err(explain(format!("the graph has no input {name}")));
            }
        }
        for name in [&graph.output.name, &graph.state.output] {
            if !has(session.outputs(), name) {
                return Err(explain(format!("the graph has no output {name}")));
            }
        }
        Ok(Self {
            session,
            input: Shape::new("input", &graph.input.shape).map_err(explain)?,
            output: Shape::new("output", &graph.output.shape).map_err(explain)?,
            state: Shape::new("state", &graph.state.shape).map_err(explain)?,
            graph: graph.clone(),
            sample_rate: [sample_rate as i64],
            inputs: Vec::new(),
            states: Vec::new(),
        })
    }

    /// Numbers that go in for each stream.
    #[must_use]
    pub fn input_size(&self) -> usize {
        self.input.each()
    }

    /// Numbers that come out for each stream.
    #[must_use]
    pub fn output_size(&self) -> usize {
        self.output.each()
    }

    /// Numbers of each stream's state.
    #[must_use]
    pub fn state_size(&self) -> usize {
        self.state.each()
    }

    /// Runs the graph once for all rows together. Where it fails, or a row's result is no number, the row's `done` says so, its
    /// output is zeros, and so is its state, lest it be poisoned.
    pub fn run(&mut self, rows: &mut [Row<'_>]) {
        if rows.is_empty() {
            return;
        }
        let sizes = (self.input_size(), self.state_size(), self.output_size());
        if rows
            .iter()
            .any(|r| (r.input.len(), r.state.len(), r.output.len()) != sizes)
        {
            return fail(rows, "a tensor of another size than the manifest's");
        }
        if let Err(error) = self.forward(rows) {
            return fail(rows, &error.to_string());
        }
        for row in rows {
            row.done = if row.output.iter().all(|x| x.is_finite()) {
                Ok(())
            } else {
                row.state.fill(0.0);
                row.output.fill(0.0);
                Err(CodecError::Failed(format!(
                    "{}: the result is no number",
                    self.graph.file
                )))
            };
        }
    }

    fn forward(&mut self, rows: &mut [Row<'_>]) -> Result<(), ort::Error> {
        let streams = rows.len();
        self.inputs.resize(streams * self.input.each(), 0.0);
        self.states.resize(streams * self.state.each(), 0.0);
        for (stream, row) in rows.iter().enumerate() {
            scatter(&self.input, row.input, &mut self.inputs, stream, streams);
            scatter(&self.state, row.state, &mut self.states, stream, streams);
        }
        let input = TensorRef::from_array_view((self.input.of(streams), self.inputs.as_slice()))?;
        let state = TensorRef::from_array_view((self.state.of(streams), self.states.as_slice()))?;
        let mut given = ort::inputs![
            self.graph.input.name.as_str() => input,
            self.graph.state.input.as_str() => state,
        ];
        if let Some(name) = &self.graph.sample_rate_input {
            let rate = TensorRef::from_array_view(([0i64; 0], self.sample_rate.as_slice()))?;
            given.push((name.as_str().into(), rate.into()));
        }
        let results = self.session.run(given)?;
        for (name, shape) in [
            (&self.graph.output.name, &self.output),
            (&self.graph.state.output, &self.state),
        ] {
            let Some(value) = results.get(name) else {
                return Err(ort::Error::new(format!("no output {name}")));
            };
            let (_, numbers) = value.try_extract_tensor::<f32>()?;
            if numbers.len() != streams * shape.each() {
                return Err(ort::Error::new(format!(
                    "{name} has {} numbers",
                    numbers.len()
                )));
            }
            let is_state = *name == self.graph.state.output;
            for (stream, row) in rows.iter_mut().enumerate() {
                let target = if is_state {
                    &mut *row.state
                } else {
                    &mut *row.output
                };
                gather(shape, numbers, target, stream, streams);
            }
        }
        Ok(())
    }
}

fn scatter(shape: &Shape, one: &[f32], all: &mut [f32], stream: usize, streams: usize) {
    for (place, part) in shape
        .places(stream, streams)
        .zip(one.chunks_exact(shape.run()))
    {
        if let Some(target) = all.get_mut(place) {
            target.copy_from_slice(part);
        }
    }
}

fn gather(shape: &Shape, all: &[f32], one: &mut [f32], stream: usize, streams: usize) {
    for (place, part) in shape
        .places(stream, streams)
        .zip(one.chunks_exact_mut(shape.run()))
    {
        if let Some(source) = all.get(place) {
            part.copy_from_slice(source);
        }
    }
}

fn fail(rows: &mut [Row<'_>], why: &str) {
    for row in rows {
        row.state.fill(0.0);
        row.output.fill(0.0);
        row.done = Err(CodecError::Failed(why.to_owned()));
    }
}

/// One thread, because every codec thread has sessions of its own; denormal numbers as zero, because speech fades into them.
fn session(environment: &Environment, model: &[u8]) -> Result<Session, ort::Error> {
    Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_intra_threads(1)?
        .with_inter_threads(1)?
        .with_intra_op_spinning(false)?
        .with_flush_to_zero()?
        .commit_from_memory(model)
}

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/cmplx"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/livekit/server-sdk-go/v2/pkg/oggreader"
	"github.com/pion/webrtc/v4/pkg/media/ivfreader"
)

// rate is the sampling rate in Hz of all audio.
const rate = 48000

// ffmpeg runs ffmpeg with `in` on its standard input and returns its standard output. Opus and video are encoded and
// decoded by it, because Go has no encoder without cgo.
func ffmpeg(in []byte, args ...string) ([]byte, error) {
	cmd := exec.Command("ffmpeg", append([]string{"-nostdin", "-hide_banner", "-v", "error"}, args...)...)
	if in != nil {
		cmd.Args = append([]string{"ffmpeg", "-hide_banner", "-v", "error"}, args...)
		cmd.Stdin = bytes.NewReader(in)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, errors.New("ffmpeg is missing; scripts/setup.sh installs it")
	}
	if err != nil {
		return nil, fmt.Errorf("ffmpeg %v: %w: %s", args, err, stderr.String())
	}
	return out, nil
}

// opusFrames encodes the audio that was asked for into 20 ms Opus packets, to be sent in a loop.
func opusFrames(o *options) ([][]byte, error) {
	channels := "1"
	if o.stereo {
		channels = "2"
	}
	args := []string{"-i", o.wav}
	if o.tone > 0 {
		// 2 s hold whole periods of any tone of a whole number of half Hz, so that the loop has no seam.
		expr := fmt.Sprintf("0.3*sin(2*PI*%g*t)", o.tone)
		if o.stereo {
			expr += fmt.Sprintf("|0.3*sin(2*PI*%g*t)", o.tone*1.5)
		}
		args = []string{"-f", "lavfi", "-i", "aevalsrc=" + expr + ":s=48000:d=20"}
	}
	args = append(args, "-c:a", "libopus", "-b:a", "48k", "-application", "voip", "-frame_duration", "20",
		"-ac", channels, "-ar", strconv.Itoa(rate), "-f", "ogg", "-")
	ogg, err := ffmpeg(nil, args...)
	if err != nil {
		return nil, err
	}
	r, _, err := oggreader.NewOggReader(bytes.NewReader(ogg))
	if err != nil {
		return nil, fmt.Errorf("ffmpeg's Ogg: %w", err)
	}
	var frames [][]byte
	for {
		frame, err := r.ReadPacket()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("ffmpeg's Ogg: %w", err)
		}
		if !bytes.HasPrefix(frame, []byte("Opus")) {
			frames = append(frames, bytes.Clone(frame))
		}
	}
	if len(frames) == 0 {
		return nil, errors.New("ffmpeg encoded no Opus packets")
	}
	return frames, nil
}

// videoFrames encodes 10 s of a test picture at 30 frames/s with a key frame every second.
func videoFrames(o *options) ([][]byte, error) {
	codec := map[string]string{"vp8": "libvpx", "vp9": "libvpx-vp9"}[o.videoCodec]
	ivf, err := ffmpeg(nil, "-f", "lavfi", "-i", fmt.Sprintf("testsrc2=size=%dx%d:rate=30:duration=10", o.videoWidth, o.videoHeight),
		"-pix_fmt", "yuv420p", "-c:v", codec, "-b:v", "600k", "-g", "30", "-deadline", "realtime", "-cpu-used", "8", "-lag-in-frames", "0",
		"-auto-alt-ref", "0", "-f", "ivf", "-")
	if err != nil {
		return nil, err
	}
	r, _, err := ivfreader.NewWith(bytes.NewReader(ivf))
	if err != nil {
		return nil, fmt.Errorf("ffmpeg's IVF: %w", err)
	}
	var frames [][]byte
	for {
		frame, _, err := r.ParseNextFrame()
		if err != nil {
			break
		}
		frames = append(frames, frame)
	}
	if len(frames) == 0 {
		return nil, errors.New("ffmpeg encoded no video frames")
	}
	return frames, nil
}

// decodeOgg returns mono samples of an Ogg/Opus file; gaps in its timestamps become silence.
func decodeOgg(ogg []byte) ([]float64, error) {
	raw, err := ffmpeg(ogg, "-i", "-", "-af", "aresample=async=1", "-ac", "1", "-ar", strconv.Itoa(rate), "-f", "s16le", "-")
	if err != nil {
		return nil, err
	}
	x := make([]float64, len(raw)/2)
	for i := range x {
		x[i] = float64(int16(binary.LittleEndian.Uint16(raw[2*i:]))) / 32768
	}
	return x, nil
}

// saveWav writes mono samples as a 16-bit WAV file DIR/ME-from-PEER.wav and returns its path.
func saveWav(dir, me, peer string, x []float64) (string, error) {
	path := filepath.Join(dir, me+"-from-"+peer+".wav")
	var b bytes.Buffer
	b.WriteString("RIFF")
	binary.Write(&b, binary.LittleEndian, uint32(36+2*len(x)))
	b.WriteString("WAVEfmt ")
	for _, v := range []any{uint32(16), uint16(1), uint16(1), uint32(rate), uint32(2 * rate), uint16(2), uint16(16)} {
		binary.Write(&b, binary.LittleEndian, v)
	}
	b.WriteString("data")
	binary.Write(&b, binary.LittleEndian, uint32(2*len(x)))
	for _, v := range x {
		binary.Write(&b, binary.LittleEndian, int16(math.Round(max(-1, min(1, v))*32767)))
	}
	return path, os.WriteFile(path, b.Bytes(), 0o644)
}

// audioReport says what was heard from one peer; the fields are those of ../README.md.
type audioReport struct {
	From      string   `json:"from"`
	Seconds   float64  `json:"seconds"`
	ToneHz    *float64 `json:"tone_hz"`
	ToneShare float64  `json:"tone_share"`
	RMS       float64  `json:"rms"`
	SilentMs  int      `json:"silent_ms"`
	// How much of it was sound, when the first and the last of it came, and the stretches without any between those two:
	// seconds since 1970 and ms.
	HeardMs int          `json:"heard_ms"`
	FirstAt *float64     `json:"first_at"`
	LastAt  *float64     `json:"last_at"`
	Holes   [][2]float64 `json:"holes"`
	Wav     *string      `json:"wav"`
	Packets int          `json:"packets"`
	Lost    int          `json:"lost"`
	Codec   string       `json:"codec"`
}

// analyse fills in tone, level and holes of mono samples, the last of which came at `end`.
func (r *audioReport) analyse(x []float64, end time.Time) {
	r.Holes = [][2]float64{}
	r.Seconds = round(float64(len(x))/rate, 3)
	first, last := -1, 0
	level := make([]float64, len(x)/480)
	for i := range level {
		for _, v := range x[i*480 : (i+1)*480] {
			level[i] += v * v / 480
		}
		if level[i] > 1e-6 {
			if first < 0 {
				first = i
			}
			last = i + 1
		}
	}
	if first < 0 {
		return
	}
	at := func(block int) float64 { return round(unix(end)-float64(len(x)-block*480)/rate, 3) }
	begin, finish := at(first), at(last)
	r.FirstAt, r.LastAt = &begin, &finish
	silent := 0
	for i, v := range level[first:last] {
		if v <= 1e-6 {
			silent += 10
			continue
		}
		if silent >= leastHoleMs {
			r.Holes = append(r.Holes, [2]float64{at(first + i - silent/10), float64(silent)})
		}
		r.SilentMs += silent
		r.HeardMs += 10
		silent = 0
	}
	x = x[first*480 : last*480]
	var sum float64
	for _, v := range x {
		sum += v * v
	}
	r.RMS = round(math.Sqrt(sum/float64(len(x))), 5)
	r.ToneHz, r.ToneShare = strongest(x)
}

// strongest finds the strongest frequency in Hz, and the share of the power above 40 Hz within 3 % of it.
func strongest(x []float64) (*float64, float64) {
	const n = 32768
	if len(x) < n {
		x = append(x, make([]float64, n-len(x))...)
	}
	power := make([]float64, n/2)
	a := make([]complex128, n)
	for start := 0; start+n <= len(x); start += n {
		for i := range a {
			a[i] = complex(x[start+i]*(0.5-0.5*math.Cos(2*math.Pi*float64(i)/n)), 0)
		}
		fft(a)
		for i := range power {
			v := cmplx.Abs(a[i])
			power[i] += v * v
		}
	}
	const hz = float64(rate) / n
	var total float64
	best := 0
	for i := range power {
		if float64(i)*hz < 40 {
			continue
		}
		total += power[i]
		if power[i] > power[best] || best == 0 {
			best = i
		}
	}
	if total <= 0 {
		return nil, 0
	}
	var near, centre float64
	f := float64(best) * hz
	for i := range power {
		at := float64(i) * hz
		if at > f*0.97-3 && at < f*1.03+3 {
			near += power[i]
			centre += at * power[i]
		}
	}
	tone := round(centre/near, 1)
	return &tone, round(near/total, 4)
}

// fft is an in-place radix-2 transform; len(a) is a power of two.
func fft(a []complex128) {
	n := len(a)
	for i, j := 1, 0; i < n; i++ {
		bit := n >> 1
		for ; j&bit != 0; bit >>= 1 {
			j ^= bit
		}
		j ^= bit
		if i < j {
			a[i], a[j] = a[j], a[i]
		}
	}
	for size := 2; size <= n; size <<= 1 {
		step := cmplx.Rect(1, -2*math.Pi/float64(size))
		for start := 0; start < n; start += size {
			w := complex(1, 0)
			for k := 0; k < size/2; k++ {
				u, v := a[start+k], a[start+k+size/2]*w
				a[start+k], a[start+k+size/2] = u+v, u-v
				w *= step
			}
		}
	}
}

// leastHoleMs: shorter silences are not told of one by one. stallMs: a client that its own clock finds later than this stood
// still, because the machine was busy with something else.
const leastHoleMs, stallMs = 100, 100

// unix is seconds since 1970.
func unix(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

func unixNow() *float64 {
	now := unix(time.Now())
	return &now
}

// callBegins says on standard error that the call begins, and returns when.
func callBegins() *float64 {
	fmt.Fprintln(os.Stderr, "the call begins")
	return unixNow()
}

// watchStalls notes when this process did not run for a while: the time at which that began, and ms. What it returns ends the
// watch and gives the list.
func watchStalls() func() [][2]float64 {
	const step = 20 * time.Millisecond
	found, stop := make(chan [][2]float64), make(chan struct{})
	go func() {
		stalls := [][2]float64{}
		for {
			due := time.Now().Add(step)
			select {
			case <-stop:
				found <- stalls
				return
			case <-time.After(step):
			}
			if late := time.Since(due).Milliseconds(); late >= stallMs {
				stalls = append(stalls, [2]float64{unix(due), float64(late)})
			}
		}
	}()
	return func() [][2]float64 {
		close(stop)
		return <-found
	}
}

func round(v float64, digits int) float64 {
	p := math.Pow10(digits)
	return math.Round(v*p) / p
}

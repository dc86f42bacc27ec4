package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/pion/webrtc/v4"
	"github.com/pion/webrtc/v4/pkg/media"
)

// whipReport is a clientReport with the HTTP side of WHIP.
type whipReport struct {
	clientReport
	// Location and entity tag of the session, status of each request, and the SDP that came back.
	Location string   `json:"location"`
	Requests []string `json:"requests"`
	Answer   string   `json:"answer"`
}

// whip is a WHIP client (RFC 9725) on Pion: an offer without candidates, the candidates by PATCH, an ICE restart by PATCH
// for the scenario "resume", the end by DELETE.
type whip struct {
	o         *options
	token     string
	pc        *webrtc.PeerConnection
	mu        sync.Mutex
	report    whipReport
	remotes   map[string]bool
	resource  string
	etag      string
	connected chan struct{}
	ended     chan struct{}
}

const sdpFragment = "application/trickle-ice-sdpfrag"

func runWhip(o *options) (*whipReport, []string) {
	w := &whip{o: o, remotes: map[string]bool{}, connected: make(chan struct{}, 16), ended: make(chan struct{})}
	w.report = whipReport{clientReport: clientReport{Client: "whip", Identity: o.identity, Audio: []audioReport{}, Video: []*videoReport{},
		Data: []*dataLog{}, Ice: []iceReport{}, RemoteCandidates: []string{}, Errors: []string{}}, Requests: []string{}}
	stalls := watchStalls()
	if err := w.run(); err != nil {
		w.report.Errors = append(w.report.Errors, err.Error())
	}
	if w.report.EndedAt == nil {
		w.report.EndedAt = unixNow()
	}
	w.report.Stalls = stalls()
	close(w.ended)
	if w.pc != nil {
		w.pc.Close()
	}
	for address := range w.remotes {
		w.report.RemoteCandidates = append(w.report.RemoteCandidates, address)
	}
	if len(w.report.Errors) > 0 {
		fmt.Fprintln(os.Stderr, strings.Join(w.report.Errors, "\n"))
	}
	return &w.report, w.report.Errors
}

// request sends one HTTP request; any status but `want` is an error.
func (w *whip) request(method, target, contentType, ifMatch, body string, want int) (string, http.Header, error) {
	r, err := http.NewRequest(method, target, strings.NewReader(body))
	if err != nil {
		return "", nil, err
	}
	r.Header.Set("Authorization", "Bearer "+w.token)
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	if ifMatch != "" {
		r.Header.Set("If-Match", ifMatch)
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return "", nil, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return "", nil, err
	}
	w.mu.Lock()
	w.report.Requests = append(w.report.Requests, fmt.Sprintf("%s %d", method, response.StatusCode))
	w.mu.Unlock()
	if response.StatusCode != want {
		return "", nil, fmt.Errorf("%s %s: %s: %s", method, target, response.Status, text)
	}
	return string(text), response.Header, nil
}

func (w *whip) run() error {
	var opus, pictures [][]byte
	var err error
	if w.token, err = w.o.makeToken(w.o.room, w.o.identity); err != nil {
		return err
	}
	if w.o.tone > 0 || w.o.wav != "" {
		if opus, err = opusFrames(w.o); err != nil {
			return err
		}
	}
	if w.o.videoWidth > 0 {
		if pictures, err = videoFrames(w.o); err != nil {
			return err
		}
	}
	settings := webrtc.SettingEngine{}
	settings.SetNetworkTypes([]webrtc.NetworkType{webrtc.NetworkTypeUDP4})
	settings.SetIncludeLoopbackCandidate(true)
	if w.pc, err = webrtc.NewAPI(webrtc.WithSettingEngine(settings)).NewPeerConnection(webrtc.Configuration{}); err != nil {
		return err
	}
	w.pc.OnICEConnectionStateChange(func(state webrtc.ICEConnectionState) {
		if state == webrtc.ICEConnectionStateConnected {
			select {
			case w.connected <- struct{}{}:
			default:
			}
		}
	})
	var candidates []string
	gathered := make(chan struct{})
	w.pc.OnICECandidate(func(candidate *webrtc.ICECandidate) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if candidate != nil {
			candidates = append(candidates, candidate.ToJSON().Candidate)
		} else if gathered != nil {
			close(gathered)
			gathered = nil
		}
	})
	waiting := gathered
	start := time.Now()
	if opus != nil {
		if err := w.add(webrtc.MimeTypeOpus, "audio", opus, 20*time.Millisecond); err != nil {
			return err
		}
	}
	if pictures != nil {
		if err := w.add(webrtc.MimeTypeVP8, "video", pictures, time.Second/30); err != nil {
			return err
		}
	}
	offer, err := w.pc.CreateOffer(nil)
	if err != nil {
		return err
	}
	if err := w.pc.SetLocalDescription(offer); err != nil {
		return err
	}
	endpoint, err := url.Parse(strings.Replace(w.o.url, "ws", "http", 1) + "/whip/v1")
	if err != nil {
		return err
	}
	answer, header, err := w.request("POST", endpoint.String(), "application/sdp", "", offer.SDP, http.StatusCreated)
	if err != nil {
		return err
	}
	location, err := endpoint.Parse(header.Get("Location"))
	if err != nil || header.Get("Location") == "" {
		return fmt.Errorf("Location %q: %v", header.Get("Location"), err)
	}
	w.resource, w.etag, w.report.Location, w.report.Answer = location.String(), header.Get("ETag"), header.Get("Location"), answer
	if err := w.pc.SetRemoteDescription(webrtc.SessionDescription{Type: webrtc.SDPTypeAnswer, SDP: answer}); err != nil {
		return err
	}
	<-waiting
	w.mu.Lock()
	trickled := fragment(offer.SDP, candidates)
	w.mu.Unlock()
	if _, _, err := w.request("PATCH", w.resource, sdpFragment, w.etag, trickled, http.StatusNoContent); err != nil {
		return err
	}
	if err := w.wait(start); err != nil {
		return err
	}
	ms := round(float64(time.Since(start).Microseconds())/1000, 1)
	w.report.ConnectMs = &ms
	began := time.Now()
	w.report.BeganAt = callBegins()
	if w.o.scenario == "resume" {
		time.Sleep(w.o.scenarioAt)
		w.report.Reconnecting++
		if err := w.restart(answer); err != nil {
			return fmt.Errorf("ICE restart: %w", err)
		}
		w.report.Reconnected++
	}
	time.Sleep(time.Until(began.Add(w.o.seconds)))
	w.report.EndedAt = unixNow()
	w.report.Ice = selectedPairs("pub", w.pc, w.remotes)
	_, _, err = w.request("DELETE", w.resource, "", "", "", http.StatusOK)
	return err
}

func (w *whip) wait(start time.Time) error {
	select {
	case <-w.connected:
		return nil
	case <-time.After(w.o.waitTimeout):
		return fmt.Errorf("ICE is %s after %v", w.pc.ICEConnectionState(), time.Since(start))
	}
}

// restart begins a new generation of ICE (RFC 9725, 4.4.2) and waits until it is connected.
func (w *whip) restart(answer string) error {
	offer, err := w.pc.CreateOffer(&webrtc.OfferOptions{ICERestart: true})
	if err != nil {
		return err
	}
	complete := webrtc.GatheringCompletePromise(w.pc)
	if err := w.pc.SetLocalDescription(offer); err != nil {
		return err
	}
	<-complete
	local := w.pc.LocalDescription().SDP
	var candidates []string
	for _, value := range values(local, "candidate") {
		candidates = append(candidates, "candidate:"+value)
	}
	back, header, err := w.request("PATCH", w.resource, sdpFragment, "*", fragment(local, candidates), http.StatusOK)
	if err != nil {
		return err
	}
	before := w.etag
	if w.etag = header.Get("ETag"); w.etag == before {
		return fmt.Errorf("the entity tag is still %s", before)
	}
	ufrag, pwd := values(back, "ice-ufrag"), values(back, "ice-pwd")
	if len(ufrag) == 0 || len(pwd) == 0 || ufrag[0] == values(answer, "ice-ufrag")[0] {
		return fmt.Errorf("no new credentials in %q", back)
	}
	var lines []string
	for _, line := range strings.Split(answer, "\r\n") {
		switch {
		case strings.HasPrefix(line, "a=ice-ufrag:"):
			line = "a=ice-ufrag:" + ufrag[0]
		case strings.HasPrefix(line, "a=ice-pwd:"):
			line = "a=ice-pwd:" + pwd[0]
		}
		lines = append(lines, line)
	}
	for drained := false; !drained; {
		select {
		case <-w.connected:
		default:
			drained = true
		}
	}
	if err := w.pc.SetRemoteDescription(webrtc.SessionDescription{Type: webrtc.SDPTypeAnswer, SDP: strings.Join(lines, "\r\n")}); err != nil {
		return err
	}
	return w.wait(time.Now())
}

// add publishes frames in a loop at their pace until the end.
func (w *whip) add(mime, id string, frames [][]byte, every time.Duration) error {
	track, err := webrtc.NewTrackLocalStaticSample(webrtc.RTPCodecCapability{MimeType: mime}, id, "whip")
	if err != nil {
		return err
	}
	sender, err := w.pc.AddTransceiverFromTrack(track, webrtc.RTPTransceiverInit{Direction: webrtc.RTPTransceiverDirectionSendonly})
	if err != nil {
		return err
	}
	go func() {
		for {
			if _, _, err := sender.Sender().ReadRTCP(); err != nil {
				return
			}
		}
	}()
	go func() {
		start := time.Now()
		for i := 0; ; i++ {
			// Failures are what not being connected looks like from here; the receiver counts what is missing.
			_ = track.WriteSample(media.Sample{Data: frames[i%len(frames)], Duration: every})
			select {
			case <-w.ended:
				return
			case <-time.After(time.Until(start.Add(time.Duration(i+1) * every))):
			}
		}
	}()
	return nil
}

// values are those of an attribute, in order.
func values(sdp, name string) (found []string) {
	for _, line := range strings.Split(sdp, "\r\n") {
		if value, ok := strings.CutPrefix(line, "a="+name+":"); ok {
			found = append(found, value)
		}
	}
	return found
}

// fragment is candidates as an SDP fragment (RFC 8840 section 9), with the credentials and the first m-line of `sdp`.
func fragment(sdp string, candidates []string) string {
	lines := []string{"a=group:" + values(sdp, "group")[0]}
	for _, line := range strings.Split(sdp, "\r\n") {
		if strings.HasPrefix(line, "m=") {
			lines = append(lines, line)
			break
		}
	}
	lines = append(lines, "a=mid:"+values(sdp, "mid")[0], "a=ice-ufrag:"+values(sdp, "ice-ufrag")[0], "a=ice-pwd:"+values(sdp, "ice-pwd")[0])
	for _, candidate := range candidates {
		lines = append(lines, "a="+candidate)
	}
	return strings.Join(append(lines, "a=end-of-candidates", ""), "\r\n")
}

// checkWhip says what WHIP can't do.
func checkWhip(o *options) error {
	if o.tone == 0 && o.wav == "" && o.videoWidth == 0 {
		return errors.New("--whip needs --audio or --video: a WHIP client only publishes")
	}
	if o.scenario != "none" && o.scenario != "resume" {
		return errors.New("--whip knows the scenario resume only: an ICE restart")
	}
	return nil
}

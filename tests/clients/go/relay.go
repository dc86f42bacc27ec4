package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pion/interceptor"
	"github.com/pion/webrtc/v4"
)

// A relay that isn't LiveKit's: pairs of peer connections of this process talk to each other through rtpengine, which ends DTLS-SRTP
// towards both, or with nothing between them. The packets, their counting and the report are those of the load.

// runRelay makes `load` calls of two peer connections each, both of which send `perTick` packets every 20 ms.
func runRelay(o *options) (*loadReport, []string) {
	l := &loader{o: o, stop: make(chan struct{}), spans: make([]span, 2*o.load)}
	r := &loadReport{Client: "go-relay", Participants: 2 * o.load, Rooms: o.load, Errors: []string{}}
	var ng *rtpengine
	if o.relay != "none" {
		var err error
		if ng, err = dialRtpengine(o.relay); err != nil {
			return r, []string{err.Error()}
		}
		defer ng.socket.Close()
	}
	api := relayAPI()
	begin := time.Now()
	var all []*webrtc.PeerConnection
	for i := range o.load {
		pcs, tracks, err := l.call(api, ng, i)
		all = append(all, pcs...)
		if err != nil {
			l.fail("call %d: %v", i, err)
			continue
		}
		r.Joined += len(pcs)
		for k, track := range tracks {
			r.Speakers++
			r.Pairs++
			go l.speak(track, 2*i+k)
		}
	}
	fmt.Fprintf(os.Stderr, "%d of %d calls in %v\n", r.Joined/2, o.load, time.Since(begin).Round(time.Millisecond))
	l.warmUp(r.Pairs)
	l.listening.Store(true)
	l.counting.Store(true)
	started := time.Now()
	time.Sleep(o.seconds)
	l.counting.Store(false)
	r.Seconds = round(time.Since(started).Seconds(), 2)
	close(l.stop)
	time.Sleep(300 * time.Millisecond)
	l.listening.Store(false)
	// The process that is measured is looked at until two seconds after the counting, as with the other loads.
	for _, pc := range all {
		if err := pc.Close(); err != nil {
			l.fail("close: %v", err)
		}
	}
	l.total(r)
	return r, r.Errors
}

// relayAPI is Pion on loopback alone, with Opus and no interceptor: nothing but RTP crosses.
func relayAPI() *webrtc.API {
	media := &webrtc.MediaEngine{}
	opus := webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeOpus, ClockRate: rate, Channels: 2, SDPFmtpLine: "minptime=10;useinbandfec=1"}
	if err := media.RegisterCodec(webrtc.RTPCodecParameters{RTPCodecCapability: opus, PayloadType: 111}, webrtc.RTPCodecTypeAudio); err != nil {
		panic(err)
	}
	settings := webrtc.SettingEngine{}
	settings.SetIncludeLoopbackCandidate(true)
	settings.SetNetworkTypes([]webrtc.NetworkType{webrtc.NetworkTypeUDP4})
	settings.SetIPFilter(func(ip net.IP) bool { return ip.IsLoopback() })
	return webrtc.NewAPI(webrtc.WithMediaEngine(media), webrtc.WithSettingEngine(settings), webrtc.WithInterceptorRegistry(&interceptor.Registry{}))
}

// call makes a call of two peer connections, each with a track, and returns when both are connected.
func (l *loader) call(api *webrtc.API, ng *rtpengine, i int) (pcs []*webrtc.PeerConnection, tracks []*webrtc.TrackLocalStaticRTP, err error) {
	connected := make(chan struct{}, 2)
	for side := range 2 {
		pc, err := api.NewPeerConnection(webrtc.Configuration{})
		if err != nil {
			return pcs, nil, err
		}
		pcs = append(pcs, pc)
		var once sync.Once
		pc.OnConnectionStateChange(func(s webrtc.PeerConnectionState) {
			if s == webrtc.PeerConnectionStateConnected {
				once.Do(func() { connected <- struct{}{} })
			}
		})
		pc.OnTrack(func(track *webrtc.TrackRemote, _ *webrtc.RTPReceiver) { l.listen(track) })
		codec := webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeOpus, ClockRate: rate, Channels: 2}
		track, err := webrtc.NewTrackLocalStaticRTP(codec, fmt.Sprintf("relay%d", side), "relay")
		if err != nil {
			return pcs, nil, err
		}
		if _, err = pc.AddTrack(track); err != nil {
			return pcs, nil, err
		}
		tracks = append(tracks, track)
	}
	id := fmt.Sprintf("relay-%d", i)
	offer, err := described(pcs[0], webrtc.SDPTypeOffer)
	if err != nil {
		return pcs, nil, err
	}
	if ng != nil {
		if offer, err = ng.ask("offer", id, offer); err != nil {
			return pcs, nil, err
		}
	}
	if err = pcs[1].SetRemoteDescription(webrtc.SessionDescription{Type: webrtc.SDPTypeOffer, SDP: offer}); err != nil {
		return pcs, nil, err
	}
	answer, err := described(pcs[1], webrtc.SDPTypeAnswer)
	if err != nil {
		return pcs, nil, err
	}
	if ng != nil {
		if answer, err = ng.ask("answer", id, answer); err != nil {
			return pcs, nil, err
		}
	}
	if err = pcs[0].SetRemoteDescription(webrtc.SessionDescription{Type: webrtc.SDPTypeAnswer, SDP: answer}); err != nil {
		return pcs, nil, err
	}
	for range pcs {
		select {
		case <-connected:
		case <-time.After(20 * time.Second):
			return pcs, nil, errors.New("not connected within 20 s")
		}
	}
	return pcs, tracks, nil
}

// described makes the local description of that kind and returns it once its candidates are gathered.
func described(pc *webrtc.PeerConnection, kind webrtc.SDPType) (string, error) {
	gathered := webrtc.GatheringCompletePromise(pc)
	var d webrtc.SessionDescription
	var err error
	if kind == webrtc.SDPTypeOffer {
		d, err = pc.CreateOffer(nil)
	} else {
		d, err = pc.CreateAnswer(nil)
	}
	if err == nil {
		err = pc.SetLocalDescription(d)
	}
	if err != nil {
		return "", err
	}
	<-gathered
	// rtpengine takes an address of zeros for a call on hold (RFC 2543), whatever the candidates say.
	return strings.ReplaceAll(pc.LocalDescription().SDP, "IN IP4 0.0.0.0", "IN IP4 127.0.0.1"), nil
}

// rtpengine is its ng control protocol: a datagram of a cookie and a bencoded dictionary, and the same as the answer
// (rtpengine's docs/ng_control_protocol.md).
type rtpengine struct {
	socket net.Conn
	cookie int
}

func dialRtpengine(address string) (*rtpengine, error) {
	socket, err := net.Dial("udp", address)
	if err != nil {
		return nil, err
	}
	r := &rtpengine{socket: socket}
	if _, err := r.send("d7:command4:pinge"); err != nil {
		return nil, fmt.Errorf("rtpengine does not answer on %s: %w", address, err)
	}
	return r, nil
}

// ask has an offer or an answer of a call rewritten: ICE and DTLS-SRTP end at rtpengine, towards both.
func (r *rtpengine) ask(command, call, sdp string) (string, error) {
	text := func(s string) string { return fmt.Sprintf("%d:%s", len(s), s) }
	pairs := [][2]string{{"command", text(command)}, {"call-id", text(call)}, {"from-tag", text("a")}, {"sdp", text(sdp)}}
	if command == "answer" {
		pairs = append(pairs, [2]string{"to-tag", text("b")})
	}
	pairs = append(pairs,
		[2]string{"ICE", text("force")}, [2]string{"SDES", "l" + text("off") + "e"}, [2]string{"DTLS", text("passive")}, [2]string{"transport-protocol", text("UDP/TLS/RTP/SAVPF")},
		[2]string{"rtcp-mux", "l" + text("require") + "e"}, [2]string{"replace", "l" + text("origin") + "e"})
	var body strings.Builder
	body.WriteByte('d')
	for _, p := range pairs {
		body.WriteString(text(p[0]) + p[1])
	}
	body.WriteByte('e')
	answer, err := r.send(body.String())
	if err != nil {
		return "", err
	}
	if !strings.Contains(answer, "6:result2:ok") {
		return "", fmt.Errorf("rtpengine refused the %s: %s", command, answer)
	}
	_, found, ok := strings.Cut(answer, "3:sdp")
	length, rest, colon := strings.Cut(found, ":")
	n, err := strconv.Atoi(length)
	if !ok || !colon || err != nil || n > len(rest) {
		return "", fmt.Errorf("rtpengine's answer to the %s has no SDP: %s", command, answer)
	}
	// rtpengine drops the group, and Pion refuses a section that is in none.
	return strings.Replace(rest[:n], "m=audio", "a=group:BUNDLE 0\r\nm=audio", 1), nil
}

// send returns the dictionary that answers this one.
func (r *rtpengine) send(body string) (string, error) {
	r.cookie++
	cookie := fmt.Sprintf("%d ", r.cookie)
	if _, err := r.socket.Write([]byte(cookie + body)); err != nil {
		return "", err
	}
	if err := r.socket.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	buffer := make([]byte, 65536)
	for {
		n, err := r.socket.Read(buffer)
		if err != nil {
			return "", err
		}
		if answer, ok := strings.CutPrefix(string(buffer[:n]), cookie); ok {
			return answer, nil
		}
	}
}

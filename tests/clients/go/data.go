package main

import (
	"bytes"
	"encoding/binary"
)

// dataHeader is the size of a message's header: kind (0 reliable, 1 lossy), index and length.
const dataHeader = 9

// lossyBytes is the size of a lossy message: under any MTU.
const lossyBytes = 200

// dataMessage makes a message whose every byte the receiver can recompute from its header.
func dataMessage(reliable bool, index, size int) []byte {
	kind := 1
	if reliable {
		kind = 0
	}
	b := make([]byte, size)
	b[0] = byte(kind)
	binary.BigEndian.PutUint32(b[1:], uint32(index))
	binary.BigEndian.PutUint32(b[5:], uint32(size))
	for i := dataHeader; i < size; i++ {
		b[i] = byte(i*7 + index*31 + kind)
	}
	return b
}

// dataLog counts what came from one peer, and how much of it was not what its header says.
type dataLog struct {
	From       string `json:"from"`
	Reliable   int    `json:"reliable"`
	Lossy      int    `json:"lossy"`
	Bytes      int    `json:"bytes"`
	Bad        int    `json:"bad"`
	Duplicates int    `json:"duplicates"`
	seen       map[[5]byte]bool
}

func (l *dataLog) add(p []byte) {
	l.Bytes += len(p)
	if len(p) < dataHeader || p[0] > 1 {
		l.Bad++
		return
	}
	index := int(binary.BigEndian.Uint32(p[1:]))
	size := int(binary.BigEndian.Uint32(p[5:]))
	if size != len(p) || !bytes.Equal(p, dataMessage(p[0] == 0, index, size)) {
		l.Bad++
		return
	}
	id := [5]byte(p[:5])
	if l.seen[id] {
		l.Duplicates++
		return
	}
	l.seen[id] = true
	if p[0] == 0 {
		l.Reliable++
	} else {
		l.Lossy++
	}
}

// Writes what Go's net/url makes of queries, as a table for src/proto/query/tests.rs, which names the command.
package main

import (
	"encoding/json"
	"fmt"
	"math/rand"
	"net/url"
)

var written = []string{
	"", "&", "&&", "=", "=x", "sid", "sid=", "sid=a", "sid=a&sid=b", "SID=a", "s%69d=a", "%73%69%64=a", "sid=%41", "sid=%4", "sid=%",
	"sid=%zz", "sid=%4g", "s%zzid=a", "sid=a+b", "sid=a%2Bb", "+sid=a", "si+d=a", "sid=a;b", "sid=a;sid=b", ";sid=a", "x;sid=a", "sid=a&;",
	"x=1;y=2&sid=a", "sid=a=b", "sid==a", "sid=a&x", "x&sid=a", "sid%3Da", "sid%3da=b", "sid=a%26sid%3Db", "sid=a%3Bb", "sid=%00", "sid=%0a",
	"sid=%ff", "sid=%C3%A9", "sid=\u00e9", "sid=a#b", "sid=a?b", "?sid=a", "sid[]=a", "sid.x=a", "%00sid=a", "sid%00=a", " sid=a", "sid =a",
	"sid=a&s%69d=b", "sid&sid=a", "sid=&sid=a", "sid=%2541", "access_token=a&access%5Ftoken=b", "access%5ftoken=b", "access_token=a%2e",
}

func main() {
	pieces := []string{"sid", "s%69d", "access_token", "x", "=", "=", "&", "&", "%", "%4", "%41", "%zz", "+", ";", "a", "%3B", "%26", "%3D", "\u00e9", "%C3"}
	random := rand.New(rand.NewSource(1))
	for range 400 {
		query := ""
		for range random.Intn(8) {
			query += pieces[random.Intn(len(pieces))]
		}
		written = append(written, query)
	}
	for _, query := range written {
		values, err := url.ParseQuery(query)
		bytes := map[string][][]byte{}
		for name, all := range values {
			for _, value := range all {
				bytes[name] = append(bytes[name], []byte(value))
			}
		}
		sid, token := bytes["sid"], bytes["access_token"]
		line, _ := json.Marshal(map[string]any{"query": query, "error": err != nil, "sid": hex(sid), "access_token": hex(token)})
		fmt.Println(string(line))
	}
}

func hex(all [][]byte) []string {
	out := []string{}
	for _, value := range all {
		out = append(out, fmt.Sprintf("%x", value))
	}
	return out
}

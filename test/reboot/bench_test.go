//go:build bench

package reboot

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// figures are what `make bench-reboot` measures; times in seconds.
type figures struct {
	Containers int     `json:"containers"`
	Bytes      int64   `json:"bytes"`
	Dump       float64 `json:"dump"`      // stasis prepare-reboot, the kubelet stopped
	Write      float64 `json:"write"`     // dd of the same bytes, with fsync
	Restore    float64 `json:"restore"`   // sum of the restores
	Read       float64 `json:"read"`      // cat of the same bytes, not in memory
	Answer     float64 `json:"answer"`    // from power-on to all pods' answer, restored
	Cold       float64 `json:"cold"`      // the same without checkpoints
	DumpRatio  float64 `json:"dumpRatio"` // of what it is compared with
	ReadRatio  float64 `json:"restoreRatio"`
	BootRatio  float64 `json:"answerRatio"`
}

// TestBench compares a node's dump, restore and return with the least that they
// could cost, in one machine. Emulated as it is, only the ratios tell something.
func TestBench(t *testing.T) {
	n, _ := ready(t)
	seconds := func(what, script string) float64 {
		t.Helper()
		out := n.must(offLimit, `begin=$(date +%s.%N); { `+script+`; } >&2 || exit 1; end=$(date +%s.%N); echo; echo "took $(echo "$end $begin" | awk '{print $1-$2}')"`)
		_, took, _ := strings.Cut(out, "\ntook ")
		f, err := strconv.ParseFloat(strings.TrimSpace(took), 64)
		if err != nil {
			t.Fatalf("%s: %v: %s", what, err, out)
		}
		n.log("%s: %.2f s", what, f)
		return f
	}
	var f figures
	n.must(lookLimit, "systemctl stop kubelet; sync")
	f.Dump = seconds("dump", "stasis prepare-reboot -o json >/run/prepared")
	var prepared struct{ Containers []struct{ SizeBytes int64 } }
	if err := json.Unmarshal([]byte(n.must(lookLimit, "cat /run/prepared")), &prepared); err != nil {
		t.Fatal(err)
	}
	for _, c := range prepared.Containers {
		f.Bytes += c.SizeBytes
		f.Containers++
	}
	const all = "find /var/lib/stasis/checkpoints -type f -print0 | xargs -0 cat"
	seconds("into memory", all+" >/dev/null")
	f.Write = seconds("write", all+" | dd of=/var/lib/bench bs=1M iflag=fullblock conv=fsync status=none")
	n.must(lookLimit, "rm /var/lib/bench; sync; echo 3 >/proc/sys/vm/drop_caches")
	f.Read = seconds("read", all+" >/dev/null")
	seen := saved.events
	n.reboot()

	answer := func() float64 {
		n.on("7.2", defaultCPU)
		n.up(bootLimit)
		n.await("all pods answer", podsLimit, nil)
		return time.Since(n.booted).Seconds()
	}
	f.Answer = answer()
	for _, e := range n.events()[seen:] {
		if e.Type == event.Restored {
			f.Restore += float64(e.DurationMicros) / 1e6
		}
	}
	n.must(lookLimit, "sync")
	n.cut() // no dump, so that the next boot finds no checkpoint
	f.Cold = answer()
	f.DumpRatio, f.ReadRatio, f.BootRatio = f.Dump/f.Write, f.Restore/f.Read, f.Answer/f.Cold

	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(env("STASIS_OUT", t.TempDir()), "bench-reboot.json")
	if err := os.WriteFile(name, append(b, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d containers, %.1f MiB\n%s", f.Containers, float64(f.Bytes)/(1<<20), table([][4]string{
		{"", "stasis, s", "compared with, s", "ratio"},
		{"dump of the node / dd of the same bytes + fsync", sec(f.Dump), sec(f.Write), sec(f.DumpRatio)},
		{"restores, summed / reading the same bytes", sec(f.Restore), sec(f.Read), sec(f.ReadRatio)},
		{"power-on to all pods' answer / the same, cold", sec(f.Answer), sec(f.Cold), sec(f.BootRatio)},
	}))
}

func sec(f float64) string { return fmt.Sprintf("%.2f", f) }

func table(rows [][4]string) string {
	var b strings.Builder
	for _, r := range rows {
		fmt.Fprintf(&b, "%-50s %10s %18s %8s\n", r[0], r[1], r[2], r[3])
	}
	return b.String()
}

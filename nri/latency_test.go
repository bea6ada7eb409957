package nri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

const manyRecords = 10000

// fullStore is a store with one committed record for each of n keys. They are
// written without the store's fsyncs, which would take minutes.
func fullStore(tb testing.TB, n int) *store.Store {
	tb.Helper()
	root := filepath.Join(tb.TempDir(), "store")
	st, err := store.Open(fsys.OS{}, root)
	if err != nil {
		tb.Fatal(err)
	}
	for i := range n {
		writeRecord(tb, root, identityNumber(i), time.Unix(1767225600+int64(i), 0))
	}
	return st
}

func identityNumber(i int) checkpoint.Identity {
	return checkpoint.Identity{Namespace: "default", Key: fmt.Sprintf("key-%d", i), Container: "c"}
}

func writeRecord(tb testing.TB, root string, i checkpoint.Identity, at time.Time) checkpoint.ID {
	tb.Helper()
	id := checkpoint.NewID(i, at)
	m := checkpoint.Manifest{FormatVersion: checkpoint.FormatVersion, ID: id, Identity: i, CreatedAt: at, ImageDigest: digestA}
	for f := range 40 { // about as many as CRIU writes for a small container
		m.Files = append(m.Files, checkpoint.File{Path: fmt.Sprintf("checkpoint/image-%d.img", f), SizeBytes: 4096, CRC32C: "01234567"})
	}
	b, err := m.Encode()
	if err != nil {
		tb.Fatal(err)
	}
	dir := filepath.Join(root, "checkpoints", i.Hash(), string(id))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, checkpoint.ManifestFile), b, 0o600); err != nil {
		tb.Fatal(err)
	}
	return id
}

func request(tb testing.TB, c *connection, i int) {
	pod := testPod(map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationKey: identityNumber(i).Key})
	a, _, err := c.CreateContainer(context.Background(), pod, testContainer(nil))
	if err != nil || a.GetAnnotations()[checkpoint.InternalCheckpointID] == "" {
		tb.Fatalf("request %d: %v, error %v", i, a, err)
	}
}

// TestLatency holds the answer to CreateContainer to 5 ms at the 99th
// percentile, with ten thousand records in the store.
func TestLatency(t *testing.T) {
	st := fullStore(t, manyRecords)
	p, _ := testPlugin(st.Latest)
	c := &connection{plugin: p, ctx: context.Background()}
	const requests, limit = 1000, 5 * time.Millisecond
	var p99 time.Duration
	for range 5 { // other work on the machine may spoil some rounds, not all
		took := make([]time.Duration, requests)
		for n := range took {
			start := time.Now()
			request(t, c, n*7919%manyRecords)
			took[n] = time.Since(start)
		}
		slices.Sort(took)
		p99 = took[requests*99/100]
		t.Logf("median %v, 99th percentile %v, worst %v", took[requests/2], p99, took[requests-1])
		if p99 <= limit {
			return
		}
	}
	t.Errorf("99th percentile %v, want at most %v", p99, limit)
}

func BenchmarkCreateContainer(b *testing.B) {
	st := fullStore(b, manyRecords)
	p, _ := testPlugin(st.Latest)
	c := &connection{plugin: p, ctx: context.Background()}
	n := 0
	for b.Loop() {
		request(b, c, n*7919%manyRecords)
		n++
	}
}

// TestQuarantine lets the daemon set a damaged record aside, out of the request.
func TestQuarantine(t *testing.T) {
	st := fullStore(t, 1)
	s := newServer(Config{Root: st.Root()}, st)
	i := identityNumber(0)
	m, err := st.Latest(context.Background(), i)
	if err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(st.Root(), "checkpoints", i.Hash(), string(m.ID), checkpoint.ManifestFile)
	if err := os.WriteFile(manifest, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := &connection{plugin: s.plugin, ctx: context.Background()}
	pod := testPod(map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationKey: i.Key})
	a, _, err := c.CreateContainer(context.Background(), pod, testContainer(nil))
	if err != nil || a.Annotations[checkpoint.InternalCheckpointID] != "" || a.Annotations[checkpoint.InternalPolicy] != "resume" {
		t.Fatalf("adjustment %v, error %v", a, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.work(ctx) // does what is queued, even at the end
	records, err := st.List(context.Background())
	if err != nil || len(records) != 1 || records[0].State != store.Quarantined || records[0].ID != m.ID {
		t.Errorf("store %+v, error %v", records, err)
	}
	got := readEvents(t, st.Root())
	if len(got) != 2 || got[0].Type != event.ColdStart || got[1].Type != event.Quarantined || got[1].CheckpointID != m.ID {
		t.Errorf("events %+v", got)
	}
	var none *api.ContainerAdjustment
	if a, _, err = c.CreateContainer(context.Background(), testPod(nil), testContainer(nil)); a != none || err != nil {
		t.Errorf("not opted in: %v, %v", a, err)
	}
}

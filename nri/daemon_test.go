package nri

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/nri/eventlog"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

func readEvents(t *testing.T, root string) (es []event.Event) {
	t.Helper()
	if err := eventlog.Read(root, func(e event.Event) { es = append(es, e) }); err != nil {
		t.Fatal(err)
	}
	return es
}

// TestDaemon runs all of it against a runtime's socket, with a record that is
// too old and one that is not, and reads what it serves.
func TestDaemon(t *testing.T) {
	st := fullStore(t, 1) // of January 2026
	fresh := writeRecord(t, st.Root(), identityNumber(1), time.Now())
	stage := filepath.Join(st.Root(), ".trash-0123")
	if err := os.Mkdir(stage, 0o700); err != nil {
		t.Fatal(err)
	}
	socket := socketPath(t)
	r, stop := startNode(t, socket)
	defer stop()
	config := Config{
		Root: st.Root(), RuntimeDir: filepath.Join(filepath.Dir(socket), "run"), NRISocket: socket, PluginIndex: "90",
		MetricsAddress: "127.0.0.1:0", GC: store.Policy{TTL: time.Hour}, GCInterval: time.Minute, MaxLogBytes: 400, Version: "v9",
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, config) }()
	path := filepath.Join(config.RuntimeDir, SocketName)
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}}}
	get := func(what string) string {
		resp, err := client.Get("http://stasis" + what)
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	eventually(t, "healthy", func() bool { return get("/healthz") == "ok\n" })
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", fi, err)
	}
	var status Status
	eventually(t, "connected, and the old record gone", func() bool {
		status = Status{}
		return json.NewDecoder(strings.NewReader(get("/status"))).Decode(&status) == nil &&
			status.Connected && status.LastGC != nil && status.LastGC.Removed == 1 && status.Store.Checkpoints[store.Committed] == 1
	})
	if status.Version != "v9" || status.Runtime != "testruntime v1.2.3" || !status.Healthy || status.Store.FreeBytes == 0 {
		t.Errorf("status %+v", status)
	}
	if _, err := os.Stat(stage); !os.IsNotExist(err) {
		t.Errorf("not swept: %v", err)
	}
	if err := Run(context.Background(), config); err == nil || !strings.Contains(err.Error(), "another stasisd") {
		t.Errorf("a second daemon: %v", err)
	}

	pod := testPod(map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationKey: "key-1"})
	if got, err := r.create(t, pod, testContainer(nil)); err != nil || got[checkpoint.InternalCheckpointID] != string(fresh) {
		t.Errorf("annotations %v, error %v", got, err)
	}
	for _, e := range []event.Event{
		{Type: event.Dumped, DurationMicros: 250000, SizeBytes: 1 << 20, Timings: &checkpoint.Timings{FrozenMicros: 9000}},
		{Type: event.DumpFailed, ReasonCode: "no-space"},
		{Type: event.Restored, DurationMicros: 300000},
		{Type: event.ColdStart, ReasonCode: "mismatch"},
		{Type: event.RestoreFail, ReasonCode: "made up"},
	} {
		if err := event.Append(st.Root(), e); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{
		`stasis_dumps_total{reason="",result="ok"} 1`,
		`stasis_dumps_total{reason="no-space",result="failed"} 1`,
		`stasis_restores_total{reason="",result="ok"} 1`,
		`stasis_restores_total{reason="mismatch",result="cold-start"} 1`,
		`stasis_restores_total{reason="other",result="failed"} 1`,
		`stasis_dump_bytes_total 1.048576e+06`,
		`stasis_dump_duration_seconds_sum 0.25`,
		`stasis_dump_frozen_seconds_sum 0.009`,
		`stasis_restore_duration_seconds_sum 0.3`,
		`stasis_events_total{type="removed"} 1`,
		`stasis_checkpoints{state="committed"} 1`,
		`stasis_nri_connected 1`,
		`stasis_nri_request_duration_seconds_count{method="CreateContainer"} 1`,
		`stasis_gc_removed_total 1`,
		`version="v9"`,
	}
	eventually(t, "metrics", func() bool {
		m := get("/metrics")
		for _, w := range want {
			if !strings.Contains(m, w) {
				return false
			}
		}
		return true
	})
	eventually(t, "the log is rotated", func() bool {
		_, err := os.Stat(filepath.Join(st.Root(), eventlog.OldFileName))
		return err == nil
	})
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("the daemon ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the daemon does not end")
	}
}

// TestReadyNotification answers as systemd would. READY comes with the runtime,
// or when the wait for it is over.
func TestReadyNotification(t *testing.T) {
	for name, tc := range map[string]struct {
		runtime bool
		timeout time.Duration
	}{
		"with a runtime":    {true, time.Hour},
		"without a runtime": {false, 100 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Dir(socketPath(t))
			conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
			t.Setenv("WATCHDOG_USEC", "300000")
			socket := filepath.Join(dir, "nri.sock")
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			done := make(chan error, 1)
			go func() {
				done <- Run(ctx, Config{Root: filepath.Join(dir, "store"), RuntimeDir: filepath.Join(dir, "run"), NRISocket: socket,
					PluginIndex: "90", GCInterval: time.Minute, MaxLogBytes: 1 << 20, ReadyTimeout: tc.timeout})
			}()
			var got bytes.Buffer
			// The watchdog needs no runtime.
			for _, want := range []string{"WATCHDOG=1", "READY=1", "STOPPING=1"} {
				for !strings.Contains(got.String(), want) {
					if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
						t.Fatal(err)
					}
					b := make([]byte, 256)
					n, err := conn.Read(b)
					if err != nil {
						t.Fatalf("no %s, only %q: %v", want, got.String(), err)
					}
					got.Write(append(b[:n], '\n'))
				}
				switch want {
				case "WATCHDOG=1":
					if tc.runtime {
						if strings.Contains(got.String(), "READY=1") {
							t.Error("ready without the runtime")
						}
						defer startRuntime(t, socket).Stop()
					}
				case "READY=1":
					cancel()
				}
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPods(t *testing.T) {
	p := newPods()
	now := time.Now()
	p.now = func() time.Time { return now }
	a1, a2, b := testPod(nil), testPod(nil), testPod(nil)
	a1.Id, a2.Id, b.Id, b.Uid = "a1", "a2", "b", "uid-b"
	p.add(a1)
	p.add(b)
	p.add(a2) // the pod's next sandbox, before the first is removed
	p.remove(a1)
	p.remove(b)
	now = now.Add(deadAfter - time.Second)
	if p.dead("uid-b") {
		t.Error("dead too early")
	}
	now = now.Add(time.Second)
	if !p.dead("uid-b") || p.dead("uid-1") {
		t.Error("of two pods, the one without a sandbox is dead")
	}
	p.add(b)
	if p.dead("uid-b") {
		t.Error("it came back")
	}
	p.remove(b)
	now = now.Add(2 * deadAfter)
	p.prune()
	if len(p.gone) != 0 {
		t.Errorf("still remembered: %v", p.gone)
	}
}

package integration

import (
	"encoding/json"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
)

// damage rewrites one file of a checkpoint. With forge the manifest is made to
// agree, as an attacker or a bug of ours would, so that only CRIU can notice.
func damage(t *testing.T, dir, pattern string, forge bool, change func([]byte) []byte) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(names) == 0 {
		t.Fatalf("no %s in %s: %v", pattern, dir, err)
	}
	data, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	data = change(data)
	if err := os.WriteFile(names[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
	if !forge {
		return
	}
	m := readManifest(t, dir)
	rel, _ := filepath.Rel(dir, names[0])
	for i := range m.Files {
		if m.Files[i].Path == rel {
			m.Files[i].SizeBytes = int64(len(data))
			m.Files[i].CRC32C = fmt.Sprintf("%08x", crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli)))
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, checkpoint.ManifestFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func flip(b []byte) []byte { b[len(b)/2] ^= 0xff; return b }

// TestColdStart makes restores impossible in every way and looks at what is
// left: a container that started cold and behaves, a reason, a record where it
// belongs. With the strict annotation the start fails instead.
func TestColdStart(t *testing.T) {
	env := func(c *cri.ContainerConfig) { c.Envs = []*cri.KeyValue{{Key: "NEW", Value: []byte("1")}} }
	for _, tc := range []struct {
		name  string
		spoil func(t *testing.T, dir string)
		opt   ctrOption
		code  string
		place string // where the record is afterwards
	}{
		{"env changed", nil, env, "mismatch", "checkpoints"},
		{"pages damaged", func(t *testing.T, dir string) { damage(t, dir, "checkpoint/pages-*.img", false, flip) }, nil, "corrupt", "quarantine"},
		{"image missing", func(t *testing.T, dir string) {
			m, _ := filepath.Glob(filepath.Join(dir, "checkpoint/pstree.img"))
			if len(m) != 1 || os.Remove(m[0]) != nil {
				t.Fatal("no pstree.img")
			}
		}, nil, "corrupt", "quarantine"},
		{"manifest damaged", func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, checkpoint.ManifestFile), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, nil, "corrupt", "quarantine"},
		{"CRIU refuses", func(t *testing.T, dir string) {
			damage(t, dir, "checkpoint/fdinfo-*.img", true, func(b []byte) []byte { return b[:len(b)-1] })
		}, nil, "criu", "quarantine"},
		{"cpu lacks a feature", func(t *testing.T, dir string) {
			m := readManifest(t, dir)
			m.Host.Arch = "riscv64"
			b, _ := json.Marshal(m)
			if err := os.WriteFile(filepath.Join(dir, checkpoint.ManifestFile), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}, nil, "incompatible", "quarantine"},
	} {
		for _, strict := range []bool{false, true} {
			name := tc.name
			if strict {
				name += ", strict"
			}
			t.Run(name, func(t *testing.T) {
				n, key := newNode(t), uniqueKey(t)
				a := annotate(key)
				if strict {
					a[checkpoint.AnnotationOnFailure] = "fail"
				}
				p := n.runPod(key, a)
				c := p.start("c", "busybox", shell(counting))
				c.mustExec("/bin/sh", "-c", "echo old >/old; echo old >/dev/shm/old")
				c.waitCount(20)
				c.stop(30)
				rs := records(t, key)
				if len(rs) != 1 {
					t.Fatalf("%d records after the dump: %+v", len(rs), events(t, key))
				}
				id := filepath.Base(rs[0])
				p.remove()
				if tc.spoil != nil {
					tc.spoil(t, rs[0])
				}

				p = n.runPod(key, a)
				var opts []ctrOption
				if tc.opt != nil {
					opts = append(opts, tc.opt)
				}
				c, err := p.tryCreate("c", "busybox", shell(counting), opts...)
				if err != nil {
					t.Fatalf("create: %v", err)
				}
				err = c.tryStart()
				if strict {
					if err == nil {
						t.Fatal("the start succeeded in spite of on-failure: fail")
					}
					wantEvent(t, key, event.RestoreFail, tc.code)
					return
				}
				if err != nil {
					t.Fatalf("start: %v", err)
				}
				wantEvent(t, key, event.ColdStart, tc.code)
				c.waitCount(3)
				if ns, _ := counts(c.log()); ns[0] != 1 {
					t.Errorf("the first count is %d, want 1", ns[0])
				}
				if out := c.mustExec("/bin/sh", "-c", "ls /old /dev/shm/old 2>/dev/null | wc -l"); out != "0" {
					t.Errorf("%s files of the old container are left", out)
				}
				if found, _ := filepath.Glob(filepath.Join(storeRoot, tc.place, "*", id)); len(found) == 0 {
					if found, _ = filepath.Glob(filepath.Join(storeRoot, tc.place, id)); len(found) == 0 {
						t.Errorf("the record %s is not in %s", id, tc.place)
					}
				}
				if st := c.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
					t.Errorf("state %v", st.State)
				}
				// The exit of the second object is seen by those who waited for the first.
				c.stop(0)
				if st := c.status(); st.State != cri.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 {
					t.Errorf("after SIGKILL: state %v, exit code %d", st.State, st.ExitCode)
				}
			})
		}
	}
}

// TestHostileAnnotations: what a pod writes into the reserved name space, or
// writes badly, changes nothing, and what is refused is told.
func TestHostileAnnotations(t *testing.T) {
	huge := strings.Repeat("x", 200<<10) // the most that gRPC and NRI let through in good time
	for _, tc := range []struct {
		name        string
		annotations map[string]string
		ignored     bool
	}{
		{"reserved id", map[string]string{checkpoint.InternalCheckpointID: "../../etc", checkpoint.InternalPolicy: "resume", checkpoint.InternalKey: "k"}, false},
		{"criu config", map[string]string{checkpoint.CRIUConfigAnnotation: "/tmp/evil.conf"}, false},
		{"unknown policy", map[string]string{checkpoint.AnnotationPolicy: "always"}, true},
		{"path as key", map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationKey: "../../x"}, true},
		{"huge value", map[string]string{checkpoint.AnnotationPolicy: "resume", checkpoint.AnnotationKey: huge}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			name := uniqueKey(t)
			p := n.runPod(name, tc.annotations)
			c := p.start("c", "busybox", shell(`trap 'exit 7' TERM; `+counting))
			c.waitCount(1) // process 1 ignores the signal until the trap is set
			for k := range c.specAnnotations() {
				if checkpoint.Reserved(k) {
					t.Errorf("annotation %s reached the runtime", k)
				}
			}
			c.stop(30)
			if st := c.status(); st.ExitCode != 7 {
				t.Errorf("exit code %d, want 7: the signal must have been delivered", st.ExitCode)
			}
			if tc.ignored && !strings.Contains(allEvents(t), name) {
				t.Error("no event tells that the annotation was ignored")
			}
		})
	}
}

func allEvents(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(storeRoot, event.FileName))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// specAnnotations reads the annotations of the container's OCI spec.
func (c *ctr) specAnnotations() map[string]string {
	c.p.n.t.Helper()
	b, err := os.ReadFile(filepath.Join("/run/containerd/io.containerd.runtime.v2.task/k8s.io", c.id, "config.json"))
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	var s struct{ Annotations map[string]string }
	if err := json.Unmarshal(b, &s); err != nil {
		c.p.n.t.Fatal(err)
	}
	return s.Annotations
}

func attempt(n uint32) ctrOption {
	return func(c *cri.ContainerConfig) { c.Metadata.Attempt = n }
}

// TestCrashLoop restarts a container in its sandbox, as the kubelet does with
// one that fails: the first restart goes on, the second within ten seconds
// starts cold, for restoring would only bring back what failed.
func TestCrashLoop(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting))
	c.waitCount(3)
	c.stop(30)
	c = p.start("c", "busybox", shell(counting), attempt(1))
	wantEvent(t, key, event.Restored, "")
	c.stop(30)
	if m := readManifest(t, records(t, key)[0]); m.RestoredFrom == "" || m.UptimeMillis >= 10_000 {
		t.Fatalf("the restored container lived %d ms, too long for this test", m.UptimeMillis)
	}
	logged := c.log()
	c = p.start("c", "busybox", shell(counting), attempt(2))
	wantEvent(t, key, event.ColdStart, "crash-loop")
	eventually(t, "a cold start", func() error {
		if ns, _ := counts(strings.TrimPrefix(c.log(), logged)); len(ns) == 0 || ns[0] != 1 {
			return fmt.Errorf("counts %v", ns)
		}
		return nil
	})
}

// TestOtherNamespace: the same key and name in another namespace is another
// identity, and gets nothing.
func TestOtherNamespace(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting))
	c.waitCount(20)
	c.stop(30)
	p.remove()
	p = n.runPod(key, annotate(key), func(c *cri.PodSandboxConfig) { c.Metadata.Namespace = "attacker" })
	c = p.start("c", "busybox", shell(counting))
	c.waitCount(1)
	if ns, _ := counts(c.log()); ns[0] != 1 {
		t.Errorf("a pod of another namespace begins with count %d", ns[0])
	}
	if len(records(t, key)) != 1 {
		t.Error("the record of the first namespace is gone")
	}
}

// stopDaemon stops stasisd; up starts it again.
func stopDaemon(t *testing.T) {
	t.Helper()
	if err := syscall.Kill(daemonPID(t, "stasisd"), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "end of the daemon", func() error {
		if err := syscall.Kill(daemonPID(t, "stasisd"), 0); err == nil {
			return fmt.Errorf("it is alive")
		}
		return nil
	})
}

// TestMissed: a container that begins cold while the daemon is away makes its
// older record worthless. The daemon sets it aside when it is back, and tells
// that the container is not dumped; so does prepare-reboot.
func TestMissed(t *testing.T) {
	n, key, other := newNode(t), uniqueKey(t), uniqueKey(t)
	bystander := n.runPod(other, annotate(other)).start("c", "busybox", shell(counting))
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting))
	c.waitCount(3)
	c.stop(30)
	p.remove()
	stopDaemon(t)
	p = n.runPod(key, annotate(key))
	c = p.start("c", "busybox", shell(counting))
	c.waitCount(1)
	run(t, "/src/test/node/up", "stasisd")
	eventually(t, "the daemon's word on it", func() error {
		var types []event.Type
		for _, e := range events(t, key) {
			if e.ContainerID == c.id && e.ReasonCode == "missed" {
				types = append(types, e.Type)
			}
		}
		if !slices.Equal(types, []event.Type{event.ColdStart, event.Quarantined}) {
			return fmt.Errorf("events %v", types)
		}
		return nil
	})
	if left := records(t, key); len(left) != 0 {
		t.Errorf("records %v", left)
	}
	if status := run(t, "stasis", "status"); !strings.Contains(status, c.id) || strings.Contains(status, bystander.id) {
		t.Errorf("stasis status:\n%s", status)
	}
	all := prepared(t, 1)
	if e := all[key]; e.Result != reboot.Failed || !strings.Contains(e.Reason, "not connected") {
		t.Errorf("prepared: %+v", e)
	}
	if e := all[other]; e.Result != reboot.Dumped {
		t.Errorf("prepared: %+v", e)
	}
	prepareReboot(t, 0, "--abort")
	// Created again, it is one like any other.
	c.stop(1) // a shell that is the first process ignores SIGTERM
	p.remove()
	if status := run(t, "stasis", "status"); strings.Contains(status, c.id) {
		t.Errorf("it is removed, and yet in stasis status:\n%s", status)
	}
	p = n.runPod(key, annotate(key))
	c = p.start("c", "busybox", shell(counting))
	c.waitCount(3)
	if ns, _ := counts(c.log()); ns[0] != 1 {
		t.Errorf("restored from what was set aside, at %d", ns[0])
	}
	c.stop(30)
	if left := records(t, key); len(left) != 1 {
		t.Errorf("records %v after its own stop", left)
	}
	p.remove()
}

// TestDaemonAway: without the daemon a pod is an ordinary pod, and a record
// waits.
func TestDaemonAway(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "busybox", shell(counting))
	c.waitCount(3)
	c.stop(30)
	p.remove()
	stopDaemon(t)
	p = n.runPod(key, annotate(key))
	c = p.start("c", "busybox", shell(trapping))
	if ns, _ := counts(c.log()); len(ns) > 0 && ns[0] != 1 {
		t.Errorf("restored without a daemon, at %d", ns[0])
	}
	c.waitCount(1)
	c.stop(30)
	if st := c.status(); st.ExitCode != 7 {
		t.Errorf("exit code %d, want the program's own 7", st.ExitCode)
	}
	p.remove()
	run(t, "/src/test/node/up", "stasisd")
	eventually(t, "the daemon's return", func() error {
		p := n.runPod(key, annotate(key))
		defer p.remove()
		c := p.start("c", "busybox", shell(counting))
		c.waitCount(0)
		if ns, _ := counts(c.log()); ns[0] == 1 {
			return fmt.Errorf("cold")
		}
		return nil
	})
}

package reboot

import (
	"encoding/json"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

var testTime = time.Date(2026, 11, 24, 20, 0, 0, 0, time.UTC)

func identity(key string) checkpoint.Identity {
	return checkpoint.Identity{Namespace: "default", Key: key, Container: "c"}
}

func dumpedEntry(key string) Entry {
	return Entry{Identity: identity(key), PodName: key, PodUID: "uid-" + key, ContainerID: "ctr-" + key, Result: Dumped,
		CheckpointID: checkpoint.NewID(identity(key), testTime), SizeBytes: 4096, Duration: time.Second}
}

func failedEntry(key, reason string) Entry {
	return Entry{Identity: identity(key), ContainerID: "ctr-" + key, Result: Failed, Reason: reason}
}

func testManifest(entries ...Entry) *Manifest {
	return &Manifest{FormatVersion: FormatVersion, BootID: "boot-1", KernelRelease: "6.12.1", PreparedAt: testTime, Containers: entries}
}

func TestManifest(t *testing.T) {
	root := t.TempDir()
	if _, err := Load(fsys.OS{}, root); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("no manifest: %v", err)
	}
	for _, m := range []*Manifest{
		testManifest(dumpedEntry("a"), failedEntry("b", "io_uring"), Entry{ContainerID: "unknown", Result: Failed, Reason: "its bundle"}),
		testManifest(),
		{FormatVersion: FormatVersion, BootID: "b", PreparedAt: testTime, StoppedKubelet: "kubelet.service", Containers: []Entry{dumpedEntry("x")}},
	} {
		if err := save(fsys.OS{}, root, m); err != nil {
			t.Fatal(err)
		}
		got, err := Load(fsys.OS{}, root)
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Containers) == 0 {
			m.Containers, got.Containers = nil, got.Containers[:0:0]
			got.Containers = nil
		}
		if !reflect.DeepEqual(got, m) {
			t.Errorf("got %+v, want %+v", got, m)
		}
	}
	if fi, err := os.Stat(filepath.Join(root, FileName)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; want mode 0600", fi.Mode(), err)
	}
	if names, err := os.ReadDir(root); err != nil || len(names) != 1 {
		t.Errorf("left over: %v, %v", names, err)
	}
	// A reason may be long and no text at all.
	m := testManifest(failedEntry("a", strings.Repeat("ä", maxReason)+"\xff"))
	if err := save(fsys.OS{}, root, m); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := remove(fsys.OS{}, root); err != nil {
			t.Error(err)
		}
	}
	if testManifest(dumpedEntry("a"), failedEntry("b", "")).Complete() || !testManifest(dumpedEntry("a")).Complete() {
		t.Error("Complete")
	}
}

// TestHostileManifest: what save does not write is not read.
func TestHostileManifest(t *testing.T) {
	spoil := func(f func(m *Manifest)) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			m := testManifest(dumpedEntry("a"), failedEntry("b", "no"))
			f(m)
			if err := save(fsys.OS{}, filepath.Dir(path), m); !errors.Is(err, checkpoint.ErrCorrupt) {
				t.Errorf("save: %v", err)
			}
			b, err := json.Marshal(m)
			if err == nil {
				err = os.WriteFile(path, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	content := func(s string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, put := range map[string]func(t *testing.T, path string){
		"empty":          content(""),
		"no JSON":        content("reboot"),
		"null":           content("null"),
		"another type":   content(`[1]`),
		"too large":      content(`{"x":"` + strings.Repeat("x", maxManifestBytes) + `"}`),
		"half":           content(`{"formatVersion":1,"bootID":"b","containers":[{"iden`),
		"two":            content(`{"formatVersion":1,"bootID":"b"}{}`),
		"future version": spoil(func(m *Manifest) { m.FormatVersion++ }),
		"no boot id":     spoil(func(m *Manifest) { m.BootID = "" }),
		"long boot id":   spoil(func(m *Manifest) { m.BootID = strings.Repeat("b", 65) }),
		"escape in the kernel's release": spoil(func(m *Manifest) {
			m.KernelRelease = "\x1b[2J"
		}),
		"unit with a space":   spoil(func(m *Manifest) { m.StoppedKubelet = "a b" }),
		"path as container":   spoil(func(m *Manifest) { m.Containers[0].ContainerID = "../../etc" }),
		"hidden container":    spoil(func(m *Manifest) { m.Containers[0].ContainerID = ".x" }),
		"container twice":     spoil(func(m *Manifest) { m.Containers[1].ContainerID = m.Containers[0].ContainerID }),
		"no identity":         spoil(func(m *Manifest) { m.Containers[0].Identity = checkpoint.Identity{} }),
		"half an identity":    spoil(func(m *Manifest) { m.Containers[1].Identity.Key = "" }),
		"no checkpoint":       spoil(func(m *Manifest) { m.Containers[0].CheckpointID = "" }),
		"path as checkpoint":  spoil(func(m *Manifest) { m.Containers[0].CheckpointID = "../x" }),
		"another's":           spoil(func(m *Manifest) { m.Containers[0].CheckpointID = checkpoint.NewID(identity("z"), testTime) }),
		"failed and dumped":   spoil(func(m *Manifest) { m.Containers[1].CheckpointID = m.Containers[0].CheckpointID }),
		"result":              spoil(func(m *Manifest) { m.Containers[0].Result = "eaten" }),
		"negative size":       spoil(func(m *Manifest) { m.Containers[0].SizeBytes = -1 }),
		"long pod name":       spoil(func(m *Manifest) { m.Containers[0].PodName = strings.Repeat("p", 254) }),
		"too many containers": spoil(func(m *Manifest) { m.Containers = make([]Entry, maxContainers+1) }),
		"link": func(t *testing.T, path string) {
			other := filepath.Join(t.TempDir(), FileName)
			if err := save(fsys.OS{}, filepath.Dir(other), testManifest()); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(other, path); err != nil {
				t.Fatal(err)
			}
		},
		"directory": func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		},
		"pipe": func(t *testing.T, path string) {
			if err := unix.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			put(t, filepath.Join(root, FileName))
			if m, err := Load(fsys.OS{}, root); !errors.Is(err, checkpoint.ErrCorrupt) || m != nil {
				t.Errorf("manifest %v, error %v; want ErrCorrupt", m, err)
			}
		})
	}
}

// TestSaveCrash crashes and fails at each operation: there is the old manifest,
// the new one, or none, and saving again works.
func TestSaveCrash(t *testing.T) {
	const root = "/var"
	base := fsys.NewMem()
	if err := errors.Join(base.Mkdir(root, 0o700), base.SyncDir("/"), save(base, root, testManifest(dumpedEntry("old")))); err != nil {
		t.Fatal(err)
	}
	check := func(files fsys.FS, want string) {
		t.Helper()
		m, err := Load(files, root)
		got := "none"
		if err == nil {
			got = m.Containers[0].Identity.Key
		} else if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("half a manifest: %v", err)
		}
		if !strings.Contains(want, got) {
			t.Errorf("%s, want %s", got, want)
		}
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	steps := 0
	for n := int64(0); ; n++ {
		mem := base.CrashClone(1, rnd)
		hook, failed := fsys.FailNth(n, unix.EIO)
		err := save(fsys.Hook(mem, hook), root, testManifest(dumpedEntry("new")))
		if !failed() {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		steps++
		for _, keep := range []float64{0, .3, .7, 1} {
			crashed := mem.CrashClone(keep, rnd)
			want := "old new none"
			if err == nil {
				want = "new"
			}
			check(crashed, want)
			if err := save(crashed, root, testManifest(dumpedEntry("new"))); err != nil {
				t.Errorf("step %d: again: %v", n, err)
			}
			check(crashed.CrashClone(0, rnd), "new")
			if err := remove(crashed, root); err != nil {
				t.Error(err)
			}
			check(crashed.CrashClone(0, rnd), "none")
		}
	}
	if steps < 8 {
		t.Errorf("only %d steps", steps)
	}
}

func FuzzManifest(f *testing.F) {
	b, err := json.Marshal(testManifest(dumpedEntry("a"), failedEntry("b", "no")))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"formatVersion":1,"bootID":"b","containers":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		root := t.TempDir()
		if err := os.WriteFile(filepath.Join(root, FileName), b, 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := Load(fsys.OS{}, root)
		if err != nil {
			return
		}
		NewTracker(m).Report("boot", nil)
		if err := save(fsys.OS{}, root, m); err != nil {
			t.Errorf("read, but not written: %v", err)
		}
	})
}

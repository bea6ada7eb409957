package checkpoint_test

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func manifest() *checkpoint.Manifest {
	i := checkpoint.Identity{Namespace: "default", Key: "db-0", Container: "app"}
	at := time.Date(2026, 1, 2, 15, 4, 5, 6, time.UTC)
	return &checkpoint.Manifest{
		FormatVersion: checkpoint.FormatVersion, ID: checkpoint.ID(i.Hash() + "-20260102T150405-89abcdef"), Identity: i, CreatedAt: at,
		PodName: "db-0", PodUID: "u", ImageDigest: "sha256:0", Generation: 2, RestoredFrom: checkpoint.ID(i.Hash() + "-20260101T150405-89abcdef"),
		Settings:    checkpoint.Settings{Policy: checkpoint.PolicyResume},
		Fingerprint: checkpoint.Fingerprint{"args": "0"},
		Volumes:     []checkpoint.Volume{{Destination: "/dev/shm", File: "volumes/0.layer"}},
		Files: []checkpoint.File{
			{Path: "checkpoint/pages-1.img", SizeBytes: 4096, CRC32C: "00000000"},
			{Path: "volumes/0.layer", SizeBytes: 0, CRC32C: "00000000"},
			{Path: "..hidden", SizeBytes: 1, CRC32C: "00000000"},
		},
	}
}

func TestManifestRoundTrip(t *testing.T) {
	m := manifest()
	data, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := checkpoint.ReadManifest(iotest.OneByteReader(bytes.NewReader(data)))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, m) {
		t.Errorf("got %+v, want %+v", got, m)
	}
}

func TestManifestValidate(t *testing.T) {
	file := func(p string) func(m *checkpoint.Manifest) {
		return func(m *checkpoint.Manifest) { m.Files[0].Path = p }
	}
	for name, change := range map[string]func(m *checkpoint.Manifest){
		"no version":          func(m *checkpoint.Manifest) { m.FormatVersion = 0 },
		"newer version":       func(m *checkpoint.Manifest) { m.FormatVersion++ },
		"id":                  func(m *checkpoint.Manifest) { m.ID = "../x" },
		"id of another":       func(m *checkpoint.Manifest) { m.ID = "0123456789abcdef-20260102T150405-89abcdef" },
		"identity":            func(m *checkpoint.Manifest) { m.Identity.Key = "a/b" },
		"identity of another": func(m *checkpoint.Manifest) { m.Identity.Key = "db-1" },
		"template":            func(m *checkpoint.Manifest) { m.Template = "../x" },
		"template's namespace": func(m *checkpoint.Manifest) {
			m.Template, m.Identity.Namespace = "x", ".."
			m.ID = checkpoint.NewID(m.Identity, m.CreatedAt)
		},
		"restored from":         func(m *checkpoint.Manifest) { m.RestoredFrom = "x" },
		"negative size":         func(m *checkpoint.Manifest) { m.Files[0].SizeBytes = -1 },
		"twice":                 file("volumes/0.layer"),
		"empty":                 file(""),
		"dot":                   file("."),
		"parent":                file(".."),
		"out":                   file("../x"),
		"out, later":            file("checkpoint/../../x"),
		"absolute":              file("/etc/shadow"),
		"not clean":             file("checkpoint//x"),
		"trailing slash":        file("checkpoint/"),
		"the manifest":          file("manifest.json"),
		"volume without a file": func(m *checkpoint.Manifest) { m.Volumes[0].File = "volumes/1.layer" },
		"volume's file is none": func(m *checkpoint.Manifest) { m.Volumes[0].File = "checkpoint/pages-1.img" },
		"volume is relative":    func(m *checkpoint.Manifest) { m.Volumes[0].Destination = "dev/shm" },
		"volume is not clean":   func(m *checkpoint.Manifest) { m.Volumes[0].Destination = "/dev/../shm" },
	} {
		m := manifest()
		if err := m.Validate(); err != nil {
			t.Fatal(err)
		}
		change(m)
		if err := m.Validate(); !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReadManifestRefuses(t *testing.T) {
	whole, err := manifest().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{
		"empty": "", "null": "null", "list": "[]", "torn": string(whole[:len(whole)/2]), "zeros": string(make([]byte, 4096)),
		"two": string(whole) + string(whole), "big": strings.Repeat(" ", checkpoint.MaxManifestBytes) + string(whole),
		"deep": strings.Repeat("[", 1<<20), "number": strings.Replace(string(whole), `"generation": 2`, `"generation": 1e999`, 1),
	} {
		if m, err := checkpoint.ReadManifest(strings.NewReader(data)); m != nil || !errors.Is(err, checkpoint.ErrCorrupt) {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
	// A reader that fails is no proof of damage.
	if _, err := checkpoint.ReadManifest(iotest.ErrReader(io.ErrNoProgress)); !errors.Is(err, io.ErrNoProgress) || errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("failing reader: %v", err)
	}
	// An endless one must end.
	if _, err := checkpoint.ReadManifest(endless{}); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("endless reader: %v", err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

// FuzzReadManifest: what is accepted is valid, and is written and read again
// the same.
func FuzzReadManifest(f *testing.F) {
	whole, err := manifest().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(bytes.Replace(whole, []byte("checkpoint/pages"), []byte("../pages"), 1))
	f.Add([]byte(`{"formatVersion":1}`))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := checkpoint.ReadManifest(bytes.NewReader(data))
		if err != nil {
			if m != nil || !errors.Is(err, checkpoint.ErrCorrupt) {
				t.Errorf("%v, %v", m, err)
			}
			return
		}
		for _, file := range m.Files {
			if strings.HasPrefix(file.Path, "/") || strings.Contains("/"+file.Path+"/", "/../") || file.SizeBytes < 0 {
				t.Errorf("accepted file %+v", file)
			}
		}
		once, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if len(once) > checkpoint.MaxManifestBytes {
			return // grown by the layout
		}
		again, err := checkpoint.ReadManifest(bytes.NewReader(once))
		if err != nil {
			t.Fatal(err)
		}
		twice, err := again.Encode()
		if err != nil || !bytes.Equal(once, twice) {
			t.Errorf("%v: %s became %s", err, once, twice)
		}
	})
}

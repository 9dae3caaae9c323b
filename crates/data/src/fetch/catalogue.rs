//! The data sets that can be had by name.

/// Checks and addresses of one file.
#[derive(Clone, Copy, Debug)]
pub struct RemoteFile {
    /// Its name, on the server and here.
    pub name: &'static str,
    /// The folder of its canonical address, with the last slash.
    pub base: &'static str,
    /// Bytes, of the file as its publisher serves it.
    pub bytes: Option<u64>,
    /// SHA-256 of the file as its publisher serves it; `None`: nothing to check against, and the outcome says so.
    pub sha256: Option<&'static str>,
    /// SHA-256 of what a `.gz` file holds: a copy that was packed again, or unpacked, is the same data.
    pub content_sha256: Option<&'static str>,
    /// A tar archive: its one folder becomes the folder of the data set.
    pub archive: bool,
}

impl RemoteFile {
    /// The canonical address.
    pub fn address(&self) -> String {
        format!("{}{}", self.base, self.name)
    }
}

/// A data set that can be had by name.
#[derive(Clone, Copy, Debug)]
pub struct Dataset {
    /// The name.
    pub name: &'static str,
    /// What is in it.
    pub doc: &'static str,
    /// Terms of use, as far as the publisher states them.
    pub licence: &'static str,
    /// The task and options that use it; `DIR` is the folder that [`super::get`] gives.
    pub usage: &'static str,
    /// Ships with the program; there is nothing to fetch.
    pub shipped: bool,
    /// The files.
    pub files: &'static [RemoteFile],
}

impl Dataset {
    /// Bytes to fetch, where they are known.
    pub fn bytes(&self) -> Option<u64> {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

const fn plain(
    name: &'static str,
    base: &'static str,
    bytes: u64,
    sha256: &'static str,
) -> RemoteFile {
    RemoteFile {
        name,
        base,
        bytes: Some(bytes),
        sha256: Some(sha256),
        content_sha256: None,
        archive: false,
    }
}

const fn gz(mut file: RemoteFile, content: &'static str) -> RemoteFile {
    file.content_sha256 = Some(content);
    file
}

const fn tar(mut file: RemoteFile) -> RemoteFile {
    file.archive = true;
    file
}

const MNIST: &str = "https://storage.googleapis.com/cvdf-datasets/mnist/";
const FASHION: &str = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/";

static DATASETS: &[Dataset] = &[
    Dataset {
        name: "cifar10",
        doc: "CIFAR-10, binary version: 50,000 + 10,000 colour pictures of 32 x 32 in 10 classes",
        licence: "none stated by the publisher",
        usage: "task sequential_cifar10 or images with path = DIR",
        shipped: false,
        files: &[tar(plain(
            "cifar-10-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ))],
    },
    Dataset {
        name: "fashion_mnist",
        doc: "Fashion-MNIST: 60,000 + 10,000 grey pictures of 28 x 28 in 10 classes",
        licence: "MIT",
        usage: "task images with path = DIR",
        shipped: false,
        files: &[
            gz(
                plain(
                    "train-images-idx3-ubyte.gz",
                    FASHION,
                    26_421_880,
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            ),
            gz(
                plain(
                    "train-labels-idx1-ubyte.gz",
                    FASHION,
                    29_515,
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            ),
            gz(
                plain(
                    "t10k-images-idx3-ubyte.gz",
                    FASHION,
                    4_422_102,
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            ),
            gz(
                plain(
                    "t10k-labels-idx1-ubyte.gz",
                    FASHION,
                    5_148,
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
        ],
    },
    Dataset {
        name: "fashion_mnist_subset",
        doc: "a class-balanced part of Fashion-MNIST: 6,000 + 1,000 pictures",
        licence: "MIT",
        usage: "task images without a path",
        shipped: true,
        files: &[],
    },
    Dataset {
        name: "imdb",
        doc: "IMDb film reviews: 25,000 + 25,000 with a verdict, 50,000 without, a UTF-8 file each",
        licence: "none stated by the publisher; cite Maas et al., ACL 2011",
        usage: "task text_classify with path = DIR, or task text with path = DIR/train/unsup",
        shipped: false,
        files: &[tar(plain(
            "aclImdb_v1.tar.gz",
            "https://ai.stanford.edu/~amaas/data/sentiment/",
            84_125_825,
            "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
        ))],
    },
    Dataset {
        name: "mnist",
        doc: "MNIST: 60,000 + 10,000 grey pictures of handwritten digits, 28 x 28",
        licence: "none stated by the publisher",
        usage: "task images with path = DIR",
        shipped: false,
        files: &[
            gz(
                plain(
                    "train-images-idx3-ubyte.gz",
                    MNIST,
                    9_912_422,
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            ),
            gz(
                plain(
                    "train-labels-idx1-ubyte.gz",
                    MNIST,
                    28_881,
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            ),
            gz(
                plain(
                    "t10k-images-idx3-ubyte.gz",
                    MNIST,
                    1_648_877,
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            ),
            gz(
                plain(
                    "t10k-labels-idx1-ubyte.gz",
                    MNIST,
                    4_542,
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
        ],
    },
    Dataset {
        name: "shakespeare",
        doc: "eight plays of Shakespeare, 1 MB of text",
        licence: "public domain; see crates/data/assets/README.md",
        usage: "task text without a path",
        shipped: true,
        files: &[],
    },
    Dataset {
        name: "tiny_shakespeare",
        doc: "the 1.1 MB of Shakespeare that char-rnn uses, for comparison with published losses",
        licence: "public domain",
        usage: "task text with path = DIR/input.txt",
        shipped: false,
        files: &[plain(
            "input.txt",
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
            1_115_394,
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        )],
    },
];

/// Every data set, sorted by name.
pub fn datasets() -> &'static [Dataset] {
    DATASETS
}
